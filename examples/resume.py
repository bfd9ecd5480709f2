"""Stop a recorded run, go on with it, and prove its text.

python examples/resume.py FOLDER [MODEL]
"""

import sys
from itertools import islice

from tokenswift_py import TokenSwift, audit

folder, *model = sys.argv[1:]
swift = TokenSwift.from_pretrained(*model)
settings = {"max_new_tokens": 200, "temperature": 0.8, "min_p": 0.05, "seed": 7}
with swift.stream("Write a story about a lighthouse.", out=folder, **settings) as stream:
    for _ in islice(stream, 20):  # as if something had stopped it here
        pass

with swift.resume(folder) as stream:
    for _ in stream:
        pass
print(stream.result().text)
print(f"proven: {audit(swift, folder).passed}")
