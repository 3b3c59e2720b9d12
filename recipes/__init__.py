"""One YAML per (base model, method), and the `train.py` that `deepspeed` launches."""
