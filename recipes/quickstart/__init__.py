"""The whole path once on a small model: the steps, the task that it learns, and the recipes of its two trained arms."""
