"""Random documents, masks and heads for hypothesis, small but with every oddity: empty, single-token, padded."""

from hypothesis import strategies as st

from ringattn import Documents, Mask

MASKS = (
    Mask(),
    Mask(causal=False),
    Mask(window=(5, -1)),
    Mask(window=(0, 0)),
    Mask(causal=False, window=(3, 4)),
    Mask(causal=False, window=(-1, 2)),
    Mask(chunk=7),
    Mask(causal=False, window=(2, -1), chunk=11),
)
HEADS = ((4, 4), (6, 2), (8, 1))


@st.composite
def documents(draw: st.DrawFn, longest: int = 70, most: int = 6) -> Documents:
    """Documents with gaps of padding between some of them."""
    lengths = draw(st.lists(st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, longest)), max_size=most))
    gaps = draw(st.lists(st.sampled_from([0, 0, 0, 1, 5]), min_size=len(lengths) + 1, max_size=len(lengths) + 1))
    starts, end = [], 0
    for length, gap in zip(lengths, gaps, strict=False):
        starts.append(end + gap)
        end += gap + length
    return Documents(lengths, starts, end + gaps[-1])


masks = st.builds(
    Mask,
    causal=st.booleans(),
    window=st.tuples(st.sampled_from([-1, 0, 1, 4, 30]), st.sampled_from([-1, 0, 3])),
    chunk=st.sampled_from([None, None, 1, 8, 33]),
)


@st.composite
def segmented_documents(draw: st.DrawFn, longest: int = 12) -> Documents:
    """Trees of depth up to 5 in any order of their segments, plain documents, blocks in both, padding at the end."""
    lengths, parents, depths, root = [], [], [], 0
    for number in range(draw(st.integers(0, 10))):
        above = [earlier for earlier in range(root, number) if depths[earlier] < 5]
        parent = draw(st.sampled_from([-1, *above, *above]))
        root = number if parent < 0 else root
        lengths.append(draw(st.integers(1, longest)))
        parents.append(parent)
        depths.append(1 if parent < 0 else depths[parent] + 1)
    blocks, start = [], 0
    for length in lengths:
        cuts = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
        blocks += [(start + a, start + b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
        start += length
    blocks = blocks if draw(st.booleans()) else []
    return Documents.from_tree(lengths, parents, blocks, start + draw(st.sampled_from([0, 0, 3])))


segment_masks = st.builds(
    Mask,
    window=st.tuples(st.sampled_from([-1, -1, 0, 1, 3, 9]), st.sampled_from([-1, 0])),
    blocks=st.sampled_from(["whole", "whole", "clipped", "clipped", "ignored"]),
)
