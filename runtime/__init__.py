"""Opening a bundle and running it: engines, devices and the pipeline. Never imports torch or transformers."""
