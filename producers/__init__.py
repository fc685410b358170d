"""What a flow runner installs. Empty on purpose: a part must not load its neighbours."""
