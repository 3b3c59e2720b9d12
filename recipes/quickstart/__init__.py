"""The whole path once on a small model: the steps, their budget of minutes, the task, and the recipes of the two trained arms."""

import os

# Before torch is loaded: its threads wait for each other asleep. Spinning, two of them on two cores that others use too trained at
# 5 positions/s where these train at 42.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
