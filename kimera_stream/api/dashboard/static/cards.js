// The list of contradictions: a bounded model, and cards that show it.

import { clash, marked } from "/dashboard/clash.js";

const KEPT = 300; // contradictions in memory
const SHOWN = 120; // cards in the document
const DECISIONS = [
  ["collapse", "One of the two is given up"],
  ["surge", "Both stay; the tension is marked"],
  ["buffer", "Wait for more"],
];

export function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

export class Contradictions {
  // resolve(id, decision): a promise. sourceOf(geoidId): who said it, where known.
  constructor(list, empty, { resolve, sourceOf }) {
    this.list = list;
    this.empty = empty;
    this.resolve = resolve;
    this.sourceOf = sourceOf;
    this.items = new Map(); // by id, oldest first
    this.cards = new Map();
    this.dirty = new Set();
    this.onlyOpen = true;
    this.minScore = 0;
    this.paused = false;
    this.scheduled = false;
  }

  put(item, fresh) {
    const known = this.items.get(item.id);
    if (known && known.offset > item.offset) return;
    // An update keeps its place: a card must not jump away under the pointer.
    this.items.set(item.id, { ...item, fresh: fresh && !known });
    if (this.items.size > KEPT) {
      const oldest = this.items.keys().next().value;
      this.items.delete(oldest);
      this.dirty.add(oldest);
    }
    this.dirty.add(item.id);
    this.schedule();
  }

  clear() {
    this.items.clear();
    this.cards.clear();
    this.dirty.clear();
    this.list.replaceChildren();
    this.schedule();
  }

  refilter() {
    this.cards.clear();
    this.list.replaceChildren();
    for (const item of this.items.values()) {
      item.fresh = false;
      this.dirty.add(item.id);
    }
    this.schedule(true);
  }

  // Sources may become known after the card was drawn.
  sourceKnown(geoidId) {
    for (const item of this.items.values()) {
      if (item.a === geoidId || item.b === geoidId) this.dirty.add(item.id);
    }
    this.schedule();
  }

  schedule(force = false) {
    if (this.scheduled || (this.paused && !force)) return;
    this.scheduled = true;
    requestAnimationFrame(() => {
      this.scheduled = false;
      this.draw();
    });
  }

  visible(item) {
    return item && item.score >= this.minScore && (!this.onlyOpen || item.state === "open");
  }

  draw() {
    for (const id of this.dirty) {
      const item = this.items.get(id);
      const old = this.cards.get(id);
      if (!this.visible(item)) {
        old?.remove();
        this.cards.delete(id);
        continue;
      }
      const hadFocus = old?.contains(document.activeElement);
      const card = this.card(item);
      if (old) old.replaceWith(card);
      else this.list.prepend(card);
      if (hadFocus) card.focus();
      this.cards.set(id, card);
    }
    this.dirty.clear();
    while (this.list.children.length > SHOWN) {
      this.cards.delete(this.list.lastElementChild.dataset.id);
      this.list.lastElementChild.remove();
    }
    this.empty.hidden = this.list.children.length > 0;
  }

  card(item) {
    const heat = item.score >= 0.8 ? 3 : item.score >= 0.6 ? 2 : 1;
    const card = element("article", `card heat-${heat}${item.fresh ? " fresh" : ""}${item.state === "open" ? "" : " closed"}`);
    card.dataset.id = item.id;
    card.tabIndex = -1;
    const head = element("div", "card-head");
    head.append(element("span", "score", item.score.toFixed(2)));
    const meter = element("span", "meter");
    const fill = element("i");
    fill.style.width = `${Math.round(item.score * 100)}%`;
    meter.append(fill);
    head.append(meter, element("span", "tag", item.gradient_type));
    if (item.state !== "open") head.append(element("span", "tag", item.state));
    if (item.provisional) head.append(element("span", "tag", "provisional"));
    head.append(element("time", "", new Date(item.detected_at).toLocaleTimeString()));
    const a = item.a_text ?? item.a;
    const b = item.b_text ?? item.b;
    const [left, right] = clash(a, b);
    const pair = element("div", "pair");
    pair.append(this.side("earlier", item.a, a, left), this.side("later", item.b, b, right));
    card.append(head, pair);
    if (item.why?.length) {
      const why = element("p", "why");
      why.append(element("b", "", "Why: "), item.why.join("; "));
      card.append(why);
    }
    if (item.state === "open") card.append(this.buttons(item));
    card.setAttribute("aria-label", `Contradiction, score ${item.score.toFixed(2)}: ${a} against ${b}`);
    return card;
  }

  side(when, id, text, spans) {
    const box = element("div", "side-text");
    const paragraph = element("p");
    paragraph.append(marked(text, spans));
    const footer = element("footer");
    footer.append(element("span", "", when));
    const source = this.sourceOf(id);
    if (source) footer.append(element("span", "source", source));
    footer.append(element("span", "", id));
    box.append(paragraph, footer);
    return box;
  }

  buttons(item) {
    const row = element("div", "resolve");
    row.append(element("span", "", "Resolve:"));
    for (const [decision, title] of DECISIONS) {
      const button = element("button", `second${item.decision === decision ? " advised" : ""}`, decision);
      button.type = "button";
      button.title = item.decision === decision ? `${title} (advised)` : title;
      button.addEventListener("click", async () => {
        for (const other of row.querySelectorAll("button")) other.disabled = true;
        try {
          await this.resolve(item.id, decision);
        } catch (error) {
          row.replaceChildren(element("span", "bad", error.message));
        }
      });
      row.append(button);
    }
    return row;
  }
}
