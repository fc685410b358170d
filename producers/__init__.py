"""What a flow runner installs. Deliberately empty: importing a part must not load its neighbours."""
