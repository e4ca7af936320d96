// Which words of two statements clash: what is highlighted on a card. The command line marks by the same rule
// (api/cli/clash.py).

const WORD = /[\p{L}\p{N}]+(?:['’.,:\-/][\p{L}\p{N}]+)*/gu;
const PLAIN = new Set(("a an the of to in on at by for from with as and or but so that this these those it its is are was were be been being am has have had "
  + "do does did will would can could may might shall should must i me my we us our you your he him his she her they them their there here who which what "
  + "s t up out than then just also still very").split(" "));
const NEGATION = /^(?:no|not|never|none|nobody|nothing|neither|nor|without|cannot|.*n['’]t)$/u;

function words(text) {
  return [...text.matchAll(WORD)].map((match) => ({ start: match.index, end: match.index + match[0].length, key: match[0].toLowerCase() }));
}

// "starts" and "started" are the same word here; numbers are compared as they are.
function stem(key) {
  return /\d/u.test(key) || key.length < 5 ? key : key.replace(/(?:ing|ed|es|s)$/u, "");
}

function own(list, others) {
  const there = new Set(others.map((word) => stem(word.key)));
  return list.filter((word) => !there.has(stem(word.key)) && (!PLAIN.has(word.key) || NEGATION.test(word.key)));
}

// Words right behind each other are marked as one.
function joined(spans, text) {
  const merged = [];
  for (const span of spans) {
    const last = merged.at(-1);
    if (last && !text.slice(last.end, span.start).trim()) last.end = span.end;
    else merged.push({ start: span.start, end: span.end });
  }
  return merged;
}

export function clash(a, b) {
  const left = words(a);
  const right = words(b);
  return [joined(own(left, right), a), joined(own(right, left), b)];
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
