"""The FineTune half of the control plane: from a declaration of artifacts to stages, Jobs and a status."""
