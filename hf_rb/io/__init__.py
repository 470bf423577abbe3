"""Files: safetensors, model folders, work that goes on where it stopped, compiled C."""
