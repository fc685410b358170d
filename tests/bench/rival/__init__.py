"""What tests/bench/peers/grouping_stream.py applies batches with: the product's code, frozen.

A copy of the admission, the rules and the SQL of commit 83d6b33 (27 November 2026): of
producers/contract/{values,messages,encoding,results}.py, worker/{rules,bounds,snapshot}.py,
worker/drain/admission.py and worker/db/{repository,statements,rows,pg_arrays,connection}.py.

It is frozen so that a faster product is compared with what it was, not with itself. Do not follow
changes of the product here, except of the tables and of what is sent and published.

It is trimmed to tag batches, the only messages of the benchmark. Left out is also what one program
with one database does without: SQLAlchemy's pool, the watch over hanging transactions, settings
that a pooler may change, dead letters, and faults described field by field. So it does no more work
for a batch than the product did.
"""
