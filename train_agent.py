"""Train the agent, prune with it, fine-tune, compare, report: the same as ``prunegraph train``.

Without arguments it trains a small ResNet on scikit-learn's digits first and prunes that.
"""

import sys

from prunegraph.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
