"""Every model in every mode of several processes, against one: ``cells`` runs them, ``table`` writes the page."""
