"""The miniature: a drawn world, and tiny but real models that caption it, answer about it and hallucinate.

`python -m training.miniature` builds everything in `bundle/` from one seed on two CPU cores. Other
modules need only `world` (scenes and their truth), `drawing` (their pictures), `language` (prompts,
questions, what a text names) and `paths` (where the bundle lies).
"""
