"""PostgreSQL: tables, statements, transactions and migrations."""
