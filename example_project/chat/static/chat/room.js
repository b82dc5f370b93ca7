// A room: one socket, subscribed to the channel of the room.

import { avatar, byId, el, recall, remember, uuid } from "./dom.js";
import { MessageLog } from "./log.js";

const room = byId("room");
const { slug, channel } = room.dataset;
const HISTORY = Number(room.dataset.history); // messages that come on entering
const PATIENCE = 10000; // how long to wait for an answer
const TYPING_EVERY = 2000; // tell the others at most this often
const TYPING_LASTS = 4000; // and believe them for this long
const COUNT_LASTS = 2500; // until the next number should have come

const title = document.title;
const log = new MessageLog(byId("scroller"), byId("log"));
const text = byId("text");
const people = new Map(); // by name
const typing = new Map(); // name: timer
const outbox = new Map(); // nonce: {text, timer}, what is not confirmed yet

// Our name in this tab, and the token that proves it after a reconnect or reload.
let identity = recall("sessionStorage", `chat:${slug}`);
let joined = false;
let wasIn = false; // joined before, so this is a return
let early = []; // what arrives between the request to join and its answer
let ended = null; // why the server has put us out
let unread = 0; // while the tab was hidden
let below = 0; // new messages under the visible part
let lastTyping = 0;

// -- connection --------------------------------------------------------------

// Whatever `auth` gives goes with each new connection: socket.auth on the server.
const socket = new io.Socket({ auth: (give) => give({ token: identity?.token ?? "" }) });

socket.on("connect", () => {
  ended = null;
  // First the channel, then the name: nothing said in between is missed.
  socket.subscribe(channel, (answer) => (answer.ok ? enter() : turnedAway(answer.error)));
});

socket.on("disconnect", (reason) => {
  joined = false;
  outbox.forEach(({ timer }) => clearTimeout(timer));
  showCount(null);
  Array.from(typing.keys()).forEach(stopsTyping);
  setStatus();
  if (ended) banner(ended, { kind: "ended" });
  else banner("Connection lost. Reconnecting…", { kind: "busy" });
  // The client comes back by itself unless it was the server that hung up.
  if (reason === "io server disconnect" && !ended) setTimeout(() => socket.connect(), 1000);
});

socket.on("connect_error", () => {
  banner("The server cannot be reached. Trying again…", { kind: "busy" });
});

function enter() {
  if (identity) join(identity.name, askName);
  else askName();
}

function join(name, refused) {
  early = [];
  socket.timeout(PATIENCE).emit("join", { room: slug, name }, (late, answer) => {
    if (late) return socket.connected && join(name, refused);
    if (answer.ok) entered(answer);
    else refused(answer.error);
  });
}

function entered(answer) {
  joined = true;
  log.me = answer.me;
  identity = { name: answer.me.name, token: answer.token };
  remember("sessionStorage", `chat:${slug}`, identity);
  remember("localStorage", "chat:name", identity.name);
  byId("join").hidden = true;
  byId("chat").hidden = false;
  banner(wasIn ? "You are back online." : null, { kind: "good" });
  if (countButton) countButton.hidden = false;
  setPeople(answer.people);
  showHistory(answer.messages);
  early.forEach(receive);
  Array.from(outbox.keys()).forEach(dispatch);
  if (!wasIn) text.focus();
  wasIn = true;
}

function turnedAway(error) {
  ended = error;
  socket.disconnect();
}

function askName(error = "") {
  identity = null;
  wasIn = false;
  banner(null);
  setStatus();
  byId("chat").hidden = true;
  byId("join").hidden = false;
  byId("people-toggle").hidden = true;
  if (countButton) countButton.hidden = true;
  showCount(null);
  showPanel(false);
  const input = byId("join-name");
  input.value ||= recall("localStorage", "chat:name") ?? "";
  nameError(error);
  input.select();
}

function nameError(error) {
  byId("join-error").textContent = error;
  byId("join-name").setAttribute("aria-invalid", String(Boolean(error)));
}

byId("join").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!socket.connected) return nameError("Not connected yet, please wait a moment.");
  join(byId("join-name").value, (error) => {
    nameError(error);
    byId("join-name").select();
  });
});

byId("leave").addEventListener("click", () => {
  remember("sessionStorage", `chat:${slug}`, null);
  joined = false;
  outbox.clear();
  log.clear();
  // To leave the channel is to leave the room; the connection stays.
  socket.unsubscribe(channel, () => socket.subscribe(channel, () => askName()));
});

byId("banner-button").addEventListener("click", () => {
  banner("Connecting…", { kind: "busy" });
  socket.connect();
});

// -- what the server says ----------------------------------------------------

const handlers = {
  message: heard,
  system: heard,
  join(person) {
    if (people.has(person.name)) return;
    people.set(person.name, person);
    showPeople();
    log.notice(person.name, "joined");
  },
  leave({ name }) {
    if (name === log.me.name) return join(name, askName); // we were taken for gone
    stopsTyping(name);
    if (!people.delete(name)) return;
    showPeople();
    log.notice(name, "left");
  },
  typing({ name }) {
    clearTimeout(typing.get(name));
    typing.set(name, setTimeout(stopsTyping, TYPING_LASTS, name));
    showTyping();
  },
  error: (data) => banner(data.text, { kind: "bad" }),
  removed: () => end("You were removed from this room."),
  elsewhere: () => end("You have joined under this name in another window."),
  closed() {
    end("This room was closed.");
    socket.disconnect();
  },
};

const ENDINGS = ["removed", "elsewhere", "closed", "error"];

socket.on("message", (data) => {
  if (joined || ENDINGS.includes(data.type)) receive(data);
  else early.push(data);
});

function receive(data) {
  handlers[data.type]?.(data);
}

function end(why) {
  ended = why;
}

function heard(message) {
  stopsTyping(message.name);
  const wasAtEnd = log.following;
  const readUntil = log.lastId;
  if (!log.add(message)) return;
  byId("nothing-said").hidden = true;
  if (message.name === log.me.name) return log.clearUnread();
  if (document.hidden) {
    if (!unread) log.markUnread(readUntil);
    unread += 1;
    document.title = `(${unread}) ${title}`;
  }
  if (!wasAtEnd) showBelow(below + 1);
  if (!document.hidden) haveRead();
}

function showHistory(messages) {
  const known = new Set(log.messages.map((entry) => entry.id));
  const missed = messages.length === HISTORY && !messages.some(({ id }) => known.has(id));
  if (known.size && missed) startOver(); // too much was missed to join the ends
  const readUntil = known.size ? log.lastId : recall("localStorage", `chat:read:${slug}`);
  log.addAll(messages);
  if (readUntil !== null && !log.hasUnread) log.markUnread(readUntil);
  if (!known.size || missed) {
    byId("earlier").hidden = messages.length < HISTORY;
    log.toEnd();
  }
  byId("nothing-said").hidden = log.entries.length > 0;
  if (!document.hidden) haveRead();
}

function startOver() {
  log.clear();
  outbox.forEach((waiting, nonce) => log.addPending(nonce, waiting.text));
}

byId("earlier").addEventListener("click", () => {
  socket.emit("history", { before: log.firstId }, (answer) => {
    if (!answer.ok) return;
    log.keepingPlace(() => log.addAll(answer.messages));
    byId("earlier").hidden = answer.messages.length < HISTORY;
    byId("scroller").focus();
  });
});

// -- read and unread ---------------------------------------------------------

function haveRead() {
  remember("localStorage", `chat:read:${slug}`, log.lastId);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) {
    unread = 0;
    document.title = title;
    haveRead();
  } else if (log.following) {
    log.clearUnread();
  }
});

byId("scroller").addEventListener("scroll", () => log.atEnd() && showBelow(0));

byId("to-end").addEventListener("click", () => {
  log.toEnd();
  text.focus();
});

function showBelow(count) {
  below = count;
  byId("to-end").hidden = !count;
  byId("to-end-text").textContent = count === 1 ? "1 new message" : `${count} new messages`;
}

// -- writing -----------------------------------------------------------------

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const said = text.value.trim();
  if (!said) return;
  const command = countButton && said.match(/^\/countdown(?:\s+(\d+))?$/);
  if (command) {
    clearText();
    return count(Number(command[1] ?? 10));
  }
  const nonce = uuid();
  outbox.set(nonce, { text: said });
  log.clearUnread();
  log.addPending(nonce, said);
  log.toEnd();
  byId("nothing-said").hidden = true;
  clearText();
  dispatch(nonce);
});

function clearText() {
  text.value = "";
  lastTyping = 0;
  fitText();
}

// Send what is in the outbox; without a connection it stays there until we are
// back. The nonce lets the server see that it has heard something before.
function dispatch(nonce) {
  const waiting = outbox.get(nonce);
  if (!joined || !waiting) return;
  const retry = () => dispatch(nonce);
  clearTimeout(waiting.timer);
  waiting.timer = setTimeout(() => log.fail(nonce, "Not sent yet.", retry), PATIENCE);
  socket.send({ text: waiting.text, nonce }, (answer) => {
    clearTimeout(waiting.timer);
    if (!joined) return; // said too early, and again once we are in
    if (!answer.ok) return log.fail(nonce, answer.error, retry);
    outbox.delete(nonce);
    log.add(answer.message);
    haveRead();
  });
}

text.addEventListener("keydown", (event) => {
  const touch = matchMedia("(pointer: coarse)").matches;
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});

text.addEventListener("input", () => {
  fitText();
  if (!joined || !text.value.trim() || Date.now() - lastTyping < TYPING_EVERY) return;
  lastTyping = Date.now();
  socket.emit("typing");
});

function fitText() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`; // the borders
  const left = text.maxLength - text.value.length;
  byId("composer-note").textContent = left < 200 ? `${left} characters left` : "";
  byId("composer").querySelector(".send").disabled = !text.value.trim();
}

// -- countdown ---------------------------------------------------------------

const countButton = document.getElementById("count"); // there is one if somebody can count

countButton?.addEventListener("click", () => count(10));

function count(seconds) {
  socket.emit("countdown", { seconds }, (answer) => {
    if (!answer.ok) banner(answer.error, { kind: "bad" });
  });
}

// An event by name. A Celery worker sends it, which has no socket at all.
socket.on("countdown", (data) => joined && showCount(data));

let countTimer;

function showCount(data) {
  clearTimeout(countTimer);
  byId("countdown").hidden = !data;
  if (!data) return;
  byId("countdown").classList.toggle("go", data.left === 0);
  byId("countdown-left").textContent = data.left || "Go!";
  byId("countdown-name").textContent = `${data.name} counts down`;
  countTimer = setTimeout(showCount, COUNT_LASTS, null);
}

// -- people ------------------------------------------------------------------

function setPeople(list) {
  people.clear();
  list.forEach((person) => people.set(person.name, person));
  showPeople();
}

function showPeople() {
  const me = log.me.name;
  const sorted = Array.from(people.values()).sort(
    (a, b) => (b.name === me) - (a.name === me) || a.name.localeCompare(b.name),
  );
  byId("people").replaceChildren(...sorted.map((person) => {
    const li = el("li", "", avatar(person), el("bdi", "", person.name));
    if (person.name === me) li.append(el("span", "you", "you"));
    return li;
  }));
  byId("people-stack").replaceChildren(...sorted.slice(0, 3).map(avatar));
  byId("people-toggle").hidden = false;
  if (wide.matches) showPanel(true);
  setStatus();
}

function setStatus() {
  const state = joined ? "online" : socket.connected ? "connecting" : "offline";
  byId("status").dataset.state = state;
  byId("status-text").textContent = { online: `${people.size} here now`, connecting: "Connected", offline: "Offline" }[state];
}

function stopsTyping(name) {
  clearTimeout(typing.get(name));
  typing.delete(name);
  showTyping();
}

function showTyping() {
  const names = Array.from(typing.keys());
  byId("typing").classList.toggle("shown", names.length > 0);
  if (!names.length) return; // the words fade out with the dots
  byId("typing-text").textContent =
    names.length > 2 ? "Several people are typing"
    : names.length === 2 ? `${names[0]} and ${names[1]} are typing`
    : `${names[0]} is typing`;
}

const wide = matchMedia("(min-width: 48rem)");
const panel = byId("people-panel");

wide.addEventListener("change", () => showPanel(wide.matches && joined));

byId("people-toggle").addEventListener("click", () => {
  showPanel(panel.hidden);
  if (!panel.hidden && !wide.matches) byId("leave").focus();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || panel.hidden || wide.matches) return;
  showPanel(false);
  byId("people-toggle").focus();
});

function showPanel(shown) {
  panel.hidden = !shown;
  byId("people-toggle").setAttribute("aria-expanded", String(shown));
}

// -- banner ------------------------------------------------------------------

let bannerTimer;

// Kinds: "busy" and "ended" stay, "good" and "bad" go after a moment.
function banner(words, { kind = "" } = {}) {
  clearTimeout(bannerTimer);
  byId("banner").hidden = !words;
  byId("banner").dataset.kind = kind;
  byId("banner-text").textContent = words ?? "";
  byId("banner-button").hidden = kind !== "ended";
  if (["good", "bad"].includes(kind)) bannerTimer = setTimeout(banner, 3000, null);
}
