"""The tab DMM over ``dmm_core.studio``: in a webui (``webui``), or as a page of its own (``alone``, ``dmm ui``).

Only ``webui`` imports a webui's modules; ``words`` imports no gradio either.
"""
