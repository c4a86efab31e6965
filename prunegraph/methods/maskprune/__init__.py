"""Gates that are learned together with the weights they multiply; one shape for all layers."""
