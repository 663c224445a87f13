"""Machines, not methods: how a cluster is reached, and whether it can hold what a run asks for."""
