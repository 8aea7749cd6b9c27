"""The paged state against the model itself: how tokens are cut into passes, mixed with other sequences, taken back,
copied, shared and restored never changes their numbers. Whatever nobody owns holds NaN."""

import pytest
import torch

from tests.models import KINDS, tiny
from trimaran.engine.paged import PagedState, Segment
from trimaran.engine.pages import Memory, Sequence
from trimaran.model.hybrid import HybridModel

every_kind = pytest.mark.parametrize("kind", KINDS)
every_page = pytest.mark.parametrize("page", [1, 16, 32])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def poisoned(model: HybridModel, **sizes) -> Memory:
    memory = Memory(model, **{"rows": 6, "pages": 400, "page": 16, **sizes})
    for pool in (memory.kv, memory.tail, memory.ssm):
        pool.fill_(torch.nan)
    return memory


def poison_free(memory: Memory) -> None:
    """NaN wherever nobody has a claim."""
    memory.kv[:, :, [page for page in range(memory.total_pages) if not memory.references(page)]] = torch.nan
    free = [*memory._slots._free, *memory._snapshots._free]
    memory.tail[:, free], memory.ssm[:, free] = torch.nan, torch.nan


class Reader:
    """A sequence, the tokens it has read, and what the model makes of them in one pass."""

    def __init__(self, model: HybridModel, sequence: Sequence, tokens: list[int]):
        self.model, self.sequence, self.tokens = model, sequence, tokens
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    def expected(self, more: list[int]) -> torch.Tensor:
        every = (*self.tokens, *more)
        if every not in self.known:
            self.known[every] = self.model.hidden(torch.tensor([every]))[0, len(self.tokens) :]
        return self.known[every]


def run(
    model: HybridModel, memory: Memory, work: list[tuple[Reader, list[int], int | None]], tolerance: float = 1e-12
) -> PagedState:
    """One pass over (reader, tokens, how many of a trial stay or None); every token's hidden vector is checked."""
    for reader, tokens, _ in work:
        assert memory.reserve(reader.sequence, len(tokens))
    view = memory.view([Segment(reader.sequence, len(tokens), kept is not None) for reader, tokens, kept in work])
    flat = torch.tensor([[token for _, tokens, _ in work for token in tokens]])
    found = model.hidden(flat, state=view)[0].split([len(tokens) for _, tokens, _ in work])
    for (reader, tokens, _), hidden in zip(work, found):
        close(hidden, reader.expected(tokens), tolerance)
    view.keep([len(tokens) if kept is None else kept for _, tokens, kept in work])
    for reader, tokens, kept in work:
        reader.tokens = reader.tokens + tokens[:kept]
        assert reader.sequence.length == len(reader.tokens)
    return view


def drawn(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(97, (count,), generator=generator).tolist()


def number(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))


@pytest.mark.parametrize(
    ("kind", "page"),
    [*((kind, 16) for kind in KINDS), *((kind, page) for kind in ("window", "everything") for page in (1, 32))],
)
def test_prompts_of_any_length_together_then_decoding(kind, page):
    model, generator = tiny(kind), torch.Generator().manual_seed(1)
    memory = poisoned(model, page=page, pages=800)
    readers = [Reader(model, memory.open(), []) for _ in range(4)]
    run(model, memory, [(r, drawn(n, generator), None) for r, n in zip(readers, (1, 2, 37, 500))])
    for _ in range(2):
        run(model, memory, [(r, drawn(1, generator), None) for r in readers])
    run(model, memory, [(r, drawn(3, generator), 2) for r in readers])


@every_kind
@pytest.mark.parametrize("seed", range(3))
def test_any_schedule(kind, seed):
    """Chunks, single tokens and trials in any order, with any outcome; forks, snapshots, ends and new beginnings."""
    model, generator = tiny(kind), torch.Generator().manual_seed(seed)
    memory = poisoned(model, page=(1, 5, 16)[seed], snapshots=3, pages=300)
    memory.sharing = ("auto", "always", "never")[number(3, generator)]
    memory.ragged = ("auto", "pad", "split")[number(3, generator)]
    readers, kept = [], []
    for _ in range(25):
        choice = number(6, generator)
        if choice == 0 and memory.free_slots:
            readers.append(Reader(model, memory.open(), []))
        elif choice == 1 and readers:
            memory.close(readers.pop(number(len(readers), generator)).sequence)
        elif choice == 2 and readers and memory.free_slots:
            source = readers[number(len(readers), generator)]
            readers.append(Reader(model, memory.fork(source.sequence), source.tokens))
        elif choice == 3 and readers:
            keep_or_restore(model, memory, readers, kept, generator)
        elif readers:
            work = []
            for place in torch.randperm(len(readers), generator=generator).tolist():
                count = (1, 1, 2, 4, 21)[number(5, generator)]
                stays = number(count + 1, generator) if number(3, generator) == 0 else None
                if number(5, generator):
                    work.append((readers[place], drawn(count, generator), stays))
            if work:
                run(model, memory, work)
        poison_free(memory)
    for reader in readers:
        memory.close(reader.sequence)
    for snapshot, pages, _ in kept:
        memory.release(snapshot)
        for page in pages:
            memory.drop(page)
    assert (memory.free_pages, memory.free_slots, memory.free_snapshots) == (300, 6, 3)


def keep_or_restore(model, memory: Memory, readers: list[Reader], kept: list, generator: torch.Generator) -> None:
    """Sets a point aside as a prefix cache would, or opens a sequence from one."""
    if kept and memory.free_slots and number(2, generator):
        snapshot, pages, tokens = kept[number(len(kept), generator)]
        full, rest = divmod(len(tokens), memory.page) if pages else (0, 0)
        held = pages[:full] + ([memory.copy_page(pages[full], rest)] if rest else [])
        for page in pages[:full]:
            memory.hold(page)
        sequence = memory.restore(snapshot, held, len(tokens))
        readers.append(Reader(model, sequence, tokens))
    elif memory.free_snapshots:
        source = readers[number(len(readers), generator)]
        pages = source.sequence.pages[: memory.pages_for(len(source.tokens))]
        for page in pages:
            memory.hold(page)
        kept.append((memory.snapshot(source.sequence), pages, source.tokens))


@every_kind
def test_a_trial_writes_no_state_until_it_is_kept(kind):
    model, generator = tiny(kind), torch.Generator().manual_seed(2)
    memory = poisoned(model)
    reader = Reader(model, memory.open(), [])
    run(model, memory, [(reader, drawn(9, generator), None)])
    before = memory.tail.clone(), memory.ssm.clone()
    for count in (1, 4):
        memory.reserve(reader.sequence, count)
        view = memory.view([Segment(reader.sequence, count, trial=True)])
        model.hidden(torch.tensor([drawn(count, generator)]), state=view)
        assert reader.sequence.length == 9
        slot = reader.sequence.slot
        assert torch.equal(memory.tail[:, slot], before[0][:, slot])
        assert torch.equal(memory.ssm[:, slot], before[1][:, slot])
    run(model, memory, [(reader, drawn(2, generator), 0)])  # the views above never happened
    run(model, memory, [(reader, drawn(2, generator), None)])


@pytest.mark.parametrize("kind", ["attention", "rope", "window", "qwen", "ngpt", "everything"])
@pytest.mark.parametrize("count", [1, 3])
def test_padded_equals_split_equals_shared(kind, count):
    """All ways of reading, over rows of lengths 1, 2, 37 and 500 and forks of the last, with a tree of common pages."""
    model, generator = tiny(kind), torch.Generator().manual_seed(3)
    memory = poisoned(model, page=16, rows=12)
    readers = [Reader(model, memory.open(), []) for _ in range(4)]
    run(model, memory, [(r, drawn(n, generator), None) for r, n in zip(readers, (1, 2, 37, 500))])
    readers += [Reader(model, memory.fork(readers[3].sequence), readers[3].tokens) for _ in range(2)]
    run(model, memory, [(r, drawn(40, generator), None) for r in readers[4:]])
    readers += [Reader(model, memory.fork(r.sequence), r.tokens) for r in (*readers[4:], readers[2], readers[5])]
    found = {}
    tokens = [drawn(count, generator) for _ in readers]
    for ragged in ("pad", "split", "auto"):
        for sharing in ("always", "never", "auto"):
            memory.ragged, memory.sharing = ragged, sharing
            run(model, memory, [(r, t, 0) for r, t in zip(readers, tokens)])
            start = memory.bytes_read
            run(model, memory, [(r, t, 0) for r, t in zip(readers, tokens)])
            found[ragged, sharing] = memory.bytes_read - start
    if kind not in ("window",):
        assert found["split", "always"] < 0.5 * found["split", "never"]
        assert found["split", "never"] < found["pad", "never"]


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("page", [1, 16])
def test_bytes_read_follow_the_formula(count, page):
    """g (m_c + b m_d) k values of keys and as many of values, against b g (m_c + m_d) k without sharing."""
    model, generator = tiny("rope"), torch.Generator().manual_seed(4)
    memory = poisoned(model, rows=8, page=page, pages=2000)
    first = Reader(model, memory.open(), [])
    run(model, memory, [(first, drawn(256, generator), None)])
    readers = [first, *(Reader(model, memory.fork(first.sequence), first.tokens) for _ in range(7))]
    for _ in range(3):
        run(model, memory, [(r, drawn(9, generator), None) for r in readers])
    memory.ragged = "split"
    batch, shared, own = 8, 256, 27 + count
    per_key = 2 * 2 * 2 * 8 * 8  # layers, keys and values, groups, width, bytes
    for sharing, keys in (("always", shared + batch * own), ("never", batch * (shared + own))):
        memory.sharing, start = sharing, memory.bytes_read
        run(model, memory, [(r, drawn(count, generator), 0) for r in readers])
        assert memory.bytes_read - start == per_key * keys


def test_neighbouring_pages_are_read_without_a_copy():
    """Rows that grow in turns keep their pages together, and one that was torn apart reads the same."""
    model, generator = tiny("rope"), torch.Generator().manual_seed(5)
    memory = poisoned(model, pages=128, page=4, rows=8)
    readers = [Reader(model, memory.open(), []) for _ in range(8)]
    for _ in range(8):
        run(model, memory, [(r, drawn(5, generator), None) for r in readers])
    for reader in readers:
        assert reader.sequence.pages == list(range(reader.sequence.pages[0], reader.sequence.pages[0] + 10))
    for ends in (readers[1:4], readers[5:6]):
        for reader in ends:
            memory.close(reader.sequence)
    poison_free(memory)
    run(model, memory, [(readers[0], drawn(200, generator), None)])
    assert any(b != a + 1 for a, b in zip(readers[0].sequence.pages, readers[0].sequence.pages[1:]))
    for count in (1, 3, 70):
        run(model, memory, [(readers[0], drawn(count, generator), 0), (readers[4], drawn(2, generator), None)])


@pytest.mark.parametrize("kind", ["latent", "everything"])
@every_page
def test_draft_block_equals_its_own_state(kind, page):
    """Pairs of several prompts in chunks, drafting several tokens deep and taken back, then what was accepted."""
    model, generator = tiny(kind), torch.Generator().manual_seed(6)
    memory = poisoned(model, page=page, pages=400)
    lengths = (1, 2, 33, 70)
    readers = [Reader(model, memory.open(), []) for _ in lengths]
    tokens = [drawn(n + 20, generator) for n in lengths]
    run(model, memory, [(r, t[:n], None) for r, t, n in zip(readers, tokens, lengths)])
    for cut in (0.5, 1.0):  # the pairs within the prompts, in two passes
        work = []
        for reader, text in zip(readers, tokens):
            end = int(cut * reader.sequence.length)
            if end - 1 > reader.sequence.mtp_length:
                work.append((reader, text, reader.sequence.mtp_length, end - 1))
        read_pairs(model, memory, work)
    for step in range(4):
        for reader, text in zip(readers, tokens):  # the newest token is known, the trunk has not read it
            assert memory.reserve(reader.sequence, 5)
            at = reader.sequence.length
            read_pairs(model, memory, [(reader, text, reader.sequence.mtp_length, at)])
        before = [r.sequence.mtp_length for r in readers]
        draft(model, memory, readers, depth=3, generator=generator)
        for reader, length in zip(readers, before):
            reader.sequence.mtp_length = length
        run(model, memory, [(r, t[len(r.tokens) :][: 1 + step], None) for r, t in zip(readers, tokens)])


def read_pairs(model: HybridModel, memory: Memory, work: list[tuple[Reader, list[int], int, int]]) -> None:
    """The draft block reads pairs from .. to of each (reader, its text), and gives what it gives in one pass."""
    wholes = [model.hidden(torch.tensor([text])) for _, text, _, _ in work]
    view = memory.view([Segment(r.sequence, end - start) for r, _, start, end in work], stack="mtp")
    hidden = torch.cat([whole[:, start:end] for whole, (_, _, start, end) in zip(wholes, work)], 1)
    follow = torch.tensor([[t for _, text, start, end in work for t in text[start + 1 : end + 1]]])
    found = model.mtp(hidden, follow, state=view)[0].split([end - start for _, _, start, end in work])
    for whole, one, (reader, text, start, end) in zip(wholes, found, work):
        expected = model.mtp(whole[:, :end], torch.tensor([text[1 : end + 1]]))
        close(one, expected[0, start:])
        assert reader.sequence.mtp_length == end


def draft(model: HybridModel, memory: Memory, readers: list[Reader], depth: int, generator: torch.Generator) -> None:
    """Several passes of one token per row, of which nothing stays."""
    for _ in range(depth):
        view = memory.view([Segment(r.sequence, 1) for r in readers], stack="mtp")
        noise = torch.randn(1, len(readers), model.config.hidden_size, generator=generator, dtype=torch.float64)
        assert model.mtp(noise, torch.tensor([drawn(len(readers), generator)]), state=view).isfinite().all()


@every_page
def test_shared_pages_hold_no_pair_that_depends_on_what_follows(page):
    """Two continuations of a prompt that ends with a page: the pair of its last token is each one's own."""
    model, generator = tiny("latent"), torch.Generator().manual_seed(7)
    memory = poisoned(model, page=page, snapshots=1)
    memory.sharing = "always"
    text = drawn(32, generator)
    first = Reader(model, memory.open(), [])
    run(model, memory, [(first, text, None)])
    read_pairs(model, memory, [(first, text, 0, 31)])
    second = Reader(model, memory.fork(first.sequence), first.tokens)
    assert second.sequence.pages == first.sequence.pages and second.sequence.mtp_length == 31
    third = Reader(model, memory.restore(memory.snapshot(first.sequence), held(memory, first), 32), first.tokens)
    assert third.sequence.mtp_length == 31
    texts = [text + drawn(8, generator) for _ in range(3)]
    for reader, own in zip((first, second, third), texts):
        assert memory.reserve(reader.sequence, 8)
        read_pairs(model, memory, [(reader, own, 31, 32)])
    for reader, own in zip((first, second, third), texts):
        run(model, memory, [(reader, own[32:36], None)])
        read_pairs(model, memory, [(reader, own, 32, 36)])
    late = memory.fork(second.sequence)  # the fork copies what is not settled
    forked = Reader(model, late, second.tokens)
    forked_text = texts[1][:37] + drawn(8, generator)
    run(model, memory, [(second, texts[1][36:39], None), (forked, forked_text[36:39], None)])
    read_pairs(model, memory, [(second, texts[1], 36, 38), (forked, forked_text, 36, 38)])


def held(memory: Memory, reader: Reader) -> list[int]:
    pages = reader.sequence.pages[: memory.pages_for(len(reader.tokens))]
    for page in pages:
        memory.hold(page)
    return pages


@every_kind
def test_in_single_precision(kind):
    model, generator = tiny(kind, torch.float32, initializer_range=0.1), torch.Generator().manual_seed(8)
    memory = poisoned(model)
    readers = [Reader(model, memory.open(), []) for _ in range(3)]
    for counts in ((3, 40, 1), (1, 1, 1), (4, 4, 1), (1, 20, 5)):
        work = [(r, drawn(n, generator), n // 2 if n == 4 else None) for r, n in zip(readers, counts)]
        run(model, memory, work, tolerance=2e-4)


def test_states_in_fp16_do_not_depend_on_the_batch():
    """Rounded by chance, yet alone or among others, in this slot or that, a sequence has bit for bit one state.

    In fp64: there alone a product's last bits, which do depend on the batch, are too small to turn a rounding.
    """
    model, generator = tiny("mamba"), torch.Generator().manual_seed(9)
    text, others = drawn(40, generator), drawn(80, generator)
    states = []
    for company in (False, True):
        memory = Memory(model, rows=3, pages=0, ssm_dtype=torch.float16)
        sequences = [memory.open() for _ in range(1 + company)]
        for place, token in enumerate(text):
            segments, tokens = [Segment(sequences[-1], 1)], [token]
            if company:
                segments, tokens = [*segments, Segment(sequences[0], 2)], tokens + others[2 * place : 2 * place + 2]
            model.hidden(torch.tensor([tokens]), state=memory.view(segments))
        states.append(memory.ssm[:, sequences[-1].slot])
    assert torch.equal(*states)


def test_heads_that_decay_slowly_go_on_adding_in_fp16():
    """A large state that grows by less than half its spacing per token: to nearest it would stand still."""
    model = tiny("mamba", torch.float32, pattern="M")
    mixer = model.backbone.layers[0].mixer
    mixer.A_log.fill_(-12.0)
    mixer.dt_bias.fill_(0.0)
    found = []
    for ssm_dtype in (None, torch.float16):
        memory = Memory(model, rows=2, pages=0, ssm_dtype=ssm_dtype)
        sequence = memory.open()
        for step in range(405):
            model.hidden(torch.tensor([[5]]), state=memory.view([Segment(sequence, 1)]))
            if step == 4:  # the convolution's tail is full: from here on every token adds the same
                before = memory.ssm[:, 0].float()
                start = 3000 * (before / (step + 1))
                memory.ssm[:, 0] = start
        found.append(memory.ssm[:, 0].float())
    exact, by_chance = found
    assert (exact - start).norm() > 0.1 * start.norm()
    assert (by_chance - exact).norm() < 0.01 * exact.norm()
    assert abs(float((by_chance - exact).sum() / exact.abs().sum())) < 0.002


def test_neighbouring_slots_are_stepped_in_place():
    """In whatever order the segments come: a group whose slots are neighbours is a view of the pool."""
    memory = Memory(tiny("mamba"), rows=6, pages=0)
    sequences = [memory.open() for _ in range(6)]
    order = [sequences[place] for place in (3, 0, 2, 1)]
    (group,) = memory.view([Segment(s, 1) for s in order]).groups
    assert group.slots == slice(0, 4) and [order[n].slot for n in group.order] == [0, 1, 2, 3]
    groups = memory.view([Segment(s, 1) for s in (sequences[5], sequences[0], sequences[2])]).groups
    assert len(groups) == 1 and groups[0].slots.tolist() == [0, 2, 5], "too few to be worth three calls"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_states_in_fp16_stay_near(dtype):
    """Single tokens, chunks and trials: half the bytes, and errors of fp16's size."""
    model, text = tiny("mamba", dtype, initializer_range=0.1), drawn(70, torch.Generator().manual_seed(10))
    found = []
    for ssm_dtype in (None, torch.float16):
        memory = Memory(model, rows=2, pages=0, ssm_dtype=ssm_dtype)
        sequence, place = memory.open(), 0
        for count, kept in ((1, 1), (20, 20), (5, 3), (1, 1), (6, 6), (4, 0)) * 2:
            view = memory.view([Segment(sequence, count, trial=True)])
            model.hidden(torch.tensor([text[place : place + count]]), state=view)
            view.keep([kept])
            place += kept
        found.append((memory.ssm[:, 0].double(), memory.ssm.nbytes))
    (exact, wide), (near, narrow) = found
    assert 1e-6 < (near - exact).norm() / exact.norm() < 3e-3
    assert narrow * (4 if dtype is torch.float64 else 2) == wide
