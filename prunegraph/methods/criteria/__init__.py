"""How much each prunable unit matters."""
