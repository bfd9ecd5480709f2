"""A file of requests and its answers, which a second run finds complete.

python examples/batch.py FOLDER [MODEL]
"""

import json
import sys
from pathlib import Path

from tokenswift_py.cli.main import main

folder, *model = sys.argv[1:]
source, answers = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
source.parent.mkdir(parents=True, exist_ok=True)
with source.open("w") as file:
    for number, who in enumerate(("a lighthouse keeper", "a cartographer", "a beekeeper")):
        body = {"prompt": f"The diary of {who}:", "max_tokens": 100, "seed": number, "min_p": 0.05}
        request = {"custom_id": who, "method": "POST", "url": "/v1/completions", "body": body}
        file.write(json.dumps(request) + "\n")

command = ["batch", str(source), str(answers), *(["--model", *model] if model else [])]
assert main(command) == main(command) == 0
for line in answers.read_text().splitlines():
    answer = json.loads(line)
    print(answer["custom_id"], answer["response"]["body"]["choices"][0]["text"], sep=":\n")
