"""Plug-ins for other libraries; each is optional and imported by name only, such as `structlin.hf`."""
