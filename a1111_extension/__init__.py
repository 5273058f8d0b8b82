"""The A1111 / Forge / reForge extension: thin over ``dmm_core``. The webuis' modules are imported here, never there.

``args``, ``styles`` and ``hook`` need torch and dmm_core alone; ``modules`` and gradio are what the others work with.
"""
