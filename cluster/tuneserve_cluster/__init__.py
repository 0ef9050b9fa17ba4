"""A real one-node Kubernetes, built from package registries, in namespaces of its own.

It exists so that the operator can be tried and tested against a real API server,
kubelet and container runtime on any Linux machine with root, where neither a
cluster nor an image registry can be reached. Nothing outside the standard
library is imported: the package runs before any virtual environment exists.
"""
