"""What the DeepSpeed launcher runs on every rank:

deepspeed --num_gpus 8 recipes/train.py --config recipes/smollm2-135m/prefix.yaml --training.learning_rate 2e-4
"""

import sys

from adapt.cli import main
from adapt.training.engine.launcher import end_with_the_launcher

if __name__ == "__main__":
    end_with_the_launcher()
    sys.exit(main(["train", *sys.argv[1:]]))
