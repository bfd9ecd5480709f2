"""A model that transformers has loaded, its own weights, and its own `generate`: written by speculation.

python examples/transformers_generate.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from tokenswift_py import hf

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
inputs = tokenizer("The lighthouse keeper wrote in his log:", return_tensors="pt", return_token_type_ids=False)
settings = {"max_new_tokens": 100, "do_sample": False}

plain = model.generate(**inputs, **settings)
ours = model.generate(**inputs, **settings, custom_generate=hf.generate, streamer=TextStreamer(tokenizer))
(report,) = ours.tokenswift
print(f"identical: {ours.tolist() == plain.tolist()}, {report['mean_acceptance_length']} tokens a pass")
print(f"engine {report['engine']}, guarantee {report['guarantee']}")
