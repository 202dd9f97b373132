"""Tests that share one real service of several replicas; a package, so that it ends with the last of them."""
