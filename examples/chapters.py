"""A long text, chapter by chapter, and how its windows read.

python examples/chapters.py [MODEL]
"""

import sys

from tokenswift_py import TokenSwift

swift = TokenSwift.from_pretrained(*sys.argv[1:])
subjects = ("a clock maker", "a court stenographer", "a weather observer")
result = swift.generate(
    "Write a story about a lamp trimmer.",
    chapters=[f"Now write a story about {subject}." for subject in subjects],
    max_new_tokens=600, min_chapter_tokens=100, temperature=0.9, min_p=0.05, dry_multiplier=0.8, seed=1,
)  # fmt: skip
print(result.text)
print(swift.window_perplexity(result).summary())
