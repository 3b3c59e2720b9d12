"""An all-reduce over all ranks that the DeepSpeed launcher starts, and what the first machine can run:

deepspeed --num_gpus 8 recipes/doctor.py
"""

import sys

from adapt.cli import main
from adapt.training.engine.launcher import end_with_the_launcher

if __name__ == "__main__":
    end_with_the_launcher()
    sys.exit(main(["doctor", *sys.argv[1:]]))
