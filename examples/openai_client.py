"""OpenAI's client against a server of one's own: a chat as it comes, and what proves it.

python examples/openai_client.py [MODEL]
"""

import re
import subprocess
import sys

from openai import OpenAI

model = ["--model", *sys.argv[1:]] if sys.argv[1:] else []
command = [sys.executable, "generate.py", "serve", "--port", "0", *model]
with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
    url = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+/v1", line)))
    client = OpenAI(base_url=url, api_key="none")
    name = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "Write a story about a lighthouse."}], max_tokens=200,
        temperature=0.8, seed=7, stream=True, extra_body={"min_p": 0.05, "dry_multiplier": 0.8},
    )  # fmt: skip
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print(f"\n{chunk.guarantee}, {chunk.numerics}, context {chunk.context}, seed {chunk.seed}")
    server.terminate()
