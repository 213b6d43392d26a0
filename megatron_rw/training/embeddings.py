"""Which pipeline ranks hold the word embeddings, for Megatron's embedding group."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training.argument_utils import core_transformer_config_from_args


def embedding_ranks(args: Namespace, pp_ranks: Sequence[int]) -> list[int]:
    """Returns the ranks of a pipeline group that hold the word embeddings.

    `pp_ranks` are the group's global ranks by stage. The first holds them, the last if the output
    layer shares their weight, and those with multi-token prediction.
    """
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)
