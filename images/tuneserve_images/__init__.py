"""Builds the images of TuneServe into one OCI layout, without a container daemon and without a registry."""
