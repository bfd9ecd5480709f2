"""Write a text, print it while it comes, and compare it with plain decoding.

python examples/write.py [MODEL]
"""

import sys

from tokenswift_py import TokenSwift

swift = TokenSwift.from_pretrained(*sys.argv[1:])
prompt = "Write a story about a lighthouse keeper who finds a letter in a bottle."
with swift.stream(prompt, max_new_tokens=300, temperature=0.8, min_p=0.05, seed=7) as stream:
    for piece in stream:
        print(piece.text, end="", flush=True)

report = swift.baseline(stream).report
print(f"\n{report['speedup']:.2f} times as fast as plain decoding, identical: {report['identical']}")
