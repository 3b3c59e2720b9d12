"""Convert a causal LM, load it, continue a text, fill blanks.

    python examples/generate.py                                                     # SmolLM2-135M-Instruct, from the Hub
    python examples/generate.py quickstart/control/model quickstart/adapted/model   # what `make quickstart` has trained

The second argument is the diffusion checkpoint; it is made if it is not there. A model that was converted and not yet
trained writes filler: train it first (docs/guide.md).
"""

import sys
from pathlib import Path

import adapt

base, checkpoint = sys.argv[1:] or ("HuggingFaceTB/SmolLM2-135M-Instruct", "out/smollm2")
if not Path(checkpoint).exists():
    adapt.convert(base, checkpoint, attention="prefix", shift_logits=True)
lm = adapt.load(checkpoint)

prompt = "Text: The train to Porto leaves at 09:40 from track 7.\nKeys: to, time, track\nJSON:"
sampler = adapt.SamplerConfig(threshold=0.95, order="left_to_right", canvas_length=8)
print(lm.write(prompt, max_new_tokens=48, sampler=sampler, show=True))  # show: each round, on standard error

print(lm.fill(prompt + ' {"to":"[?2]","time":"09:40","track":"7"}'))  # [?2]: two tokens

two = lm.write([prompt, "Once upon a time"], max_new_tokens=16)  # many at once, a text of each
for text in two:
    print(repr(text))
