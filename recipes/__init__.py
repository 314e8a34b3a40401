"""The papers' experiments: what ``conf/`` configures and ``python -m recipes.train`` runs."""
