"""The mini family: a small Stable-Diffusion-shaped base and its teachers, drawn, trained and shipped by this folder."""
