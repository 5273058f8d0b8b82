"""What the tab DMM does, without a page: folders, one activity at a time, and every action in a method.

Hosts give the folders and the care of their GPU (``desk.Host``); ``a1111_extension/tab`` draws it with gradio.
"""
