// How decode attention cuts a step's contexts: the same arithmetic as `kernels/attention/decode_splits.py`.

const PROGRAMS_PER_SM = 3,
  MIN_SPLIT = 512,
  SPLIT_MULTIPLE = 64; // as there; a test compares the two

// `lengths`: tokens of each sequence. Returns the splits in the order in which the device starts them:
// [{seq, begin, end}, …]
export function splitContexts(lengths, numKvHeads, multiprocessors) {
  const target = Math.ceil((PROGRAMS_PER_SM * multiprocessors) / numKvHeads);
  const share = Math.ceil(lengths.reduce((sum, length) => sum + length, 0) / target);
  const size = Math.max(
    Math.ceil(share / SPLIT_MULTIPLE) * SPLIT_MULTIPLE,
    leastSplit(lengths.length * numKvHeads, multiprocessors),
  );
  const splits = lengths.flatMap((length, seq) => {
    const count = Math.max(1, Math.ceil(length / size));
    return Array.from({ length: count }, (_, i) => {
      const begin = i * size,
        end = Math.min(begin + size, length);
      return { seq, begin, end, rank: i === count - 1 ? end - begin : size + 1 };
    });
  });
  return splits.sort((a, b) => b.rank - a.rank).map(({ seq, begin, end }) => ({ seq, begin, end }));
}

function leastSplit(programs, multiprocessors) {
  let split = MIN_SPLIT;
  for (; programs > 0 && programs <= multiprocessors && split > SPLIT_MULTIPLE; split /= 2) programs *= 2;
  return split;
}
