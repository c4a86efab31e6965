"""The graph encoder as a part of a process."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch_geometric.nn import GATv2Conv

from prunegraph.agent.encoder import Convolution

PROGRAM = """
import torch
from prunegraph.agent.network import NetworkConfig, PruningNetwork
network = PruningNetwork(NetworkConfig())
convolution = network.encoder.layers[0].convolutions[0]
convolution(torch.ones(3, 64), torch.tensor([[0, 1], [1, 2]])).sum().backward()
"""


def test_a_process_leaves_no_file_in_the_temporary_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, timeout=120)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_convolution_computes_what_that_of_pyg_does() -> None:
    torch.manual_seed(0)
    ours = Convolution(8, 4, heads=2, add_self_loops=False)
    theirs = GATv2Conv(8, 4, heads=2, add_self_loops=False)
    theirs.load_state_dict(ours.state_dict())
    nodes, edges = torch.randn(6, 8), torch.tensor([[0, 1, 2, 3, 3], [1, 2, 3, 4, 5]])
    assert torch.equal(ours(nodes, edges), theirs(nodes, edges))
