// The list of messages: sorted by id, each one once, grouped by author and day.

import { avatar, byId, dayOf, el, linked, momentOf, sameDay, timeOf } from "./dom.js";

const GROUP = 5 * 60 * 1000; // how long one author goes on without a new heading
const NEAR = 60; // pixels from the end that still count as the end
const PENDING = Infinity; // the place of what the server has not confirmed: last

export class MessageLog {
  constructor(scroller, list) {
    this.scroller = scroller;
    this.list = list;
    this.entries = [];
    this.me = null;
    // Stay at the end when the window or an on-screen keyboard changes the height.
    this.following = true;
    scroller.addEventListener("scroll", () => (this.following = this.atEnd()));
    new ResizeObserver(() => this.following && this.toEnd()).observe(scroller);
  }

  get messages() {
    return this.entries.filter((entry) => entry.message && entry.id !== PENDING);
  }

  get lastId() {
    return this.messages.at(-1)?.id ?? 0;
  }

  get firstId() {
    return this.messages[0]?.id;
  }

  // A message of the server. Returns whether it is new here.
  add(message) {
    const known = this.entries.find((entry) => entry.nonce === message.nonce);
    if (known?.id === PENDING) this.confirm(known, message);
    if (known) return false;
    this.insert({
      id: message.id,
      nonce: message.nonce,
      message,
      at: new Date(message.at),
      li: message.type === "system" ? systemRow(message) : this.row(message),
    });
    return true;
  }

  addAll(messages) {
    this.list.setAttribute("aria-busy", "true");
    messages.forEach((message) => this.add(message));
    this.list.removeAttribute("aria-busy");
  }

  // A message of our own, on its way.
  addPending(nonce, text) {
    const message = { ...this.me, nonce, text };
    const li = this.row(message);
    li.classList.add("pending");
    this.insert({ id: PENDING, nonce, message, at: new Date(), li });
  }

  confirm(entry, message) {
    entry.li.classList.remove("pending", "failed");
    entry.li.querySelector(".message-note").hidden = true;
    this.entries.splice(this.entries.indexOf(entry), 1);
    this.insert({ ...entry, id: message.id, message, at: new Date(message.at) });
  }

  fail(nonce, text, retry) {
    const entry = this.entries.find((entry) => entry.nonce === nonce);
    if (entry?.id !== PENDING) return;
    const again = el("button", "", "Try again");
    again.type = "button";
    again.addEventListener("click", () => {
      entry.li.classList.remove("failed");
      note.hidden = true;
      retry();
    });
    const note = entry.li.querySelector(".message-note");
    note.replaceChildren(`${text} `, again);
    note.hidden = false;
    entry.li.classList.add("failed");
  }

  // Somebody came or went. Only the last is kept if it is the same person again.
  notice(name, verb) {
    const previous = this.entries.findLast((entry) => entry.id !== PENDING);
    if (previous?.who === name) this.remove(previous);
    const who = el("bdi", "", name);
    const li = el("li", "notice", el("p", "", who, ` ${verb}`));
    this.insert({ id: this.lastId, who: name, at: new Date(), li });
  }

  row(message) {
    const li = byId("message").content.firstElementChild.cloneNode(true);
    li.querySelector(".message-avatar").replaceWith(avatar(message));
    li.querySelector("strong").textContent = message.name;
    li.querySelector(".bubble").replaceChildren(...linked(message.text));
    li.classList.toggle("own", message.name === this.me.name);
    return li;
  }

  insert(entry) {
    const follow = this.following;
    let place = this.entries.length;
    while (place > 0 && this.entries[place - 1].id > entry.id) place -= 1;
    this.entries.splice(place, 0, entry);
    const before = this.entries[place + 1]?.li ?? null;
    if (entry.li.parentNode !== this.list || entry.li.nextSibling !== before)
      this.list.insertBefore(entry.li, before);
    this.arrange(place);
    this.arrange(place + 1);
    if (follow) this.toEnd();
  }

  remove(entry) {
    const place = this.entries.indexOf(entry);
    this.entries.splice(place, 1);
    entry.li.remove();
    this.arrange(place);
  }

  clear() {
    this.entries = [];
    this.list.replaceChildren();
  }

  // Give the entry its headings, which depend on the one above it.
  arrange(place) {
    const entry = this.entries[place];
    if (!entry) return;
    const previous = this.entries[place - 1];
    const newDay = !previous || !sameDay(previous.at, entry.at);
    this.heading(entry, "day", newDay && dayOf(entry.at));
    this.heading(entry, "unread", entry.unread && "New");
    const continued =
      !newDay &&
      !entry.unread &&
      Boolean(entry.message?.name) &&
      entry.message.name === previous.message?.name &&
      entry.at - previous.at < GROUP;
    entry.li.classList.toggle("continued", continued);
    const time = entry.li.querySelector("time");
    if (!time) return;
    time.dateTime = entry.at.toISOString();
    time.textContent = timeOf(entry.at);
    const bubble = entry.li.querySelector(".bubble");
    bubble.title = momentOf(entry.at);
  }

  heading(entry, kind, text) {
    const present = entry.li.querySelector(`:scope > .${kind}`);
    if (!text) present?.remove();
    else if (present) present.firstChild.textContent = text;
    else if (kind === "day") entry.li.prepend(el("p", kind, el("span", "", text)));
    else insertAfterDay(entry.li, el("p", kind, el("span", "", text)));
  }

  // Draw the line above the first message after that id that somebody else wrote.
  markUnread(id) {
    this.clearUnread();
    const others = (entry) => entry.id > id && entry.message.name !== this.me.name;
    const first = this.messages.find(others);
    if (!first) return;
    first.unread = true;
    this.arrange(this.entries.indexOf(first));
  }

  clearUnread() {
    const place = this.entries.findIndex((entry) => entry.unread);
    if (place < 0) return;
    this.entries[place].unread = false;
    this.arrange(place);
  }

  get hasUnread() {
    return this.entries.some((entry) => entry.unread);
  }

  atEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR;
  }

  toEnd() {
    this.following = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  // Do something above the visible part without moving it.
  keepingPlace(change) {
    const fromEnd = this.scroller.scrollHeight - this.scroller.scrollTop;
    this.following = false;
    change();
    this.scroller.scrollTop = this.scroller.scrollHeight - fromEnd;
    this.following = this.atEnd();
  }
}

function insertAfterDay(li, heading) {
  const day = li.querySelector(":scope > .day");
  if (day) day.after(heading);
  else li.prepend(heading);
}

function systemRow(message) {
  const text = el("p", "", ...linked(message.text));
  text.dir = "auto";
  const head = el("p", "system-head", el("strong", "", "Announcement"), " ", el("time"));
  return el("li", "system", el("div", "bubble", head, text));
}
