"""A double of the webuis' ``modules`` package: as much of it as the extension meets, written from what the three do.

It is no webui. UNet and gradio are the real ones; the events, their order and their arguments are replayed.
"""
