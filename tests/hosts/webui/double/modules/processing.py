"""What Forge keeps beside its process_images."""

need_global_unload = False  # at the next picture everything leaves the GPU, and cached prompts are dropped
