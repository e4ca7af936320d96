// Which words of two statements differ: what is highlighted on a card.

const WORD = /[\p{L}\p{N}_]+(?:[.,:][\p{N}]+)*|[^\s]/gu;
const LONGEST = 400; // words; beyond that the table would cost more than it tells

function words(text) {
  return [...text.matchAll(WORD)].map((match) => ({ start: match.index, end: match.index + match[0].length, key: match[0].toLowerCase() }));
}

// Marks the words that are not in the longest common subsequence.
export function clash(a, b) {
  const left = words(a);
  const right = words(b);
  if (left.length > LONGEST || right.length > LONGEST) return [[], []];
  const width = right.length + 1;
  const table = new Uint16Array((left.length + 1) * width);
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      table[i * width + j] = left[i].key === right[j].key
        ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  const own = [[], []];
  let i = 0;
  let j = 0;
  while (i < left.length || j < right.length) {
    if (i < left.length && j < right.length && left[i].key === right[j].key) {
      i += 1;
      j += 1;
    } else if (j >= right.length || (i < left.length && table[(i + 1) * width + j] >= table[i * width + j + 1])) {
      own[0].push(left[i]);
      i += 1;
    } else {
      own[1].push(right[j]);
      j += 1;
    }
  }
  return own.map((list) => list.filter((word) => /[\p{L}\p{N}]/u.test(word.key)));
}

// The text with its own words marked, built from text nodes alone: nothing in it is ever read as markup.
export function marked(text, spans) {
  const fragment = document.createDocumentFragment();
  let at = 0;
  for (const span of spans) {
    fragment.append(text.slice(at, span.start));
    const mark = document.createElement("mark");
    mark.textContent = text.slice(span.start, span.end);
    fragment.append(mark);
    at = span.end;
  }
  fragment.append(text.slice(at));
  return fragment;
}
