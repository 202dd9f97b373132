"""Requests and answers as HTTP: routes, what stands before them, their bodies and their errors."""
