// The browser extension over a stub of the official client: every race, with no network or clock.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import vm from "node:vm";

const SCRIPT = fileURLToPath(
  new URL("../../django_socketio/static/django_socketio/socketio.js", import.meta.url),
);
const extend = createRequire(import.meta.url)(SCRIPT);

const OK = { ok: true };
const REFUSED = { ok: false, error: "permission denied" };
const NOT_NOW = { ok: false, error: "the backend is down", retry: true };
const ABANDONED = { ok: false, error: "unsubscribed before the server answered" };

// What the extension sees of the official socket: its offline buffer, its flags, acks that are
// dropped with the connection.
class StubSocket {
  constructor(manager, nsp, options) {
    Object.assign(this, { manager, nsp, options });
    this.connected = false;
    this.active = true;
    this.connects = 0;
    this.io = { engine: { readyState: "opening" } };
    this.listeners = {};
    this.sendBuffer = [];
    this.flags = {};
    this.sent = []; // [event, channel] of the present connection
    this.acks = []; // of the packets in `sent` that wait, in the order of their emission
    this.connections = 0;
    this.stale = false; // a ping was missed: `connected`, but emit() buffers
  }

  on(event, fn) {
    (this.listeners[event] ||= []).push(fn);
    return this;
  }

  off(event) {
    delete this.listeners[event];
  }

  trigger(event, ...args) {
    for (const fn of this.listeners[event] ?? []) fn(...args);
  }

  emit(event, ...args) {
    const ack = typeof args.at(-1) === "function" ? args.pop() : undefined;
    const packet = { event, args, ack, flags: this.flags };
    this.flags = {};
    if (this.connected && !this.stale) this.write(packet);
    else this.sendBuffer.push(packet);
    return this;
  }

  write({ event, args, ack }) {
    this.sent.push([event, ...args]);
    if (ack) this.acks.push(ack);
  }

  emitBuffered() {
    this.sendBuffer.splice(0).forEach((packet) => this.write(packet));
  }

  connect() {
    this.connects += 1;
    return this;
  }

  // What follows is the test's side.
  accept() {
    this.connected = true;
    this.id = `connection-${++this.connections}`;
    this.emitBuffered();
    this.trigger("connect");
  }

  drop(details) {
    this.connected = false;
    this.stale = false;
    delete this.id;
    this.trigger("disconnect", "transport close", details);
    this.sent = [];
    this.acks = [];
  }

  reply(...args) {
    this.acks.shift()(...args);
  }
}

// What the extension sees of the official manager when a server tells when to come back.
class StubManager {
  delay = 1000;
  max = 5000;
  attempts = [];

  reconnectionDelay(value) {
    if (value === undefined) return this.delay;
    this.delay = value;
    return this;
  }

  reconnectionDelayMax(value) {
    if (value === undefined) return this.max;
    this.max = value;
    return this;
  }

  once(event, fn) {
    assert.equal(event, "reconnect_attempt");
    this.attempts.push(fn);
  }

  attempt() {
    this.attempts.splice(0).forEach((fn) => fn());
  }
}

const closed = (reason) => ({ description: "websocket connection closed", context: { reason } });

function client() {
  class Manager {}
  const io = (url, options) => Object.assign(new StubSocket(null, "/", options), { url });
  return Object.assign(io, { io, Manager, Socket: StubSocket });
}

function connected() {
  const io = extend(client());
  const socket = new io.Socket();
  socket.accept();
  return socket;
}

const tick = () => new Promise((resolve) => setTimeout(resolve, 1));

// A callback that keeps what it was called with.
function recorder() {
  const calls = [];
  return Object.assign((...args) => calls.push(args), { calls });
}

test("the socket defaults to WebSocket first, with polling behind it", () => {
  const io = extend(client());
  const socket = new io.Socket();
  assert.equal(socket.url, undefined);
  assert.deepEqual(socket.options, {
    path: "/socket.io/",
    transports: ["websocket", "polling"],
    tryAllTransports: true,
  });
});

test("options override the defaults and are not changed", () => {
  const io = extend(client(), { path: "/rt/" });
  const options = Object.freeze({ transports: ["polling"], auth: { token: "t" } });
  const expected = {
    path: "/rt/",
    transports: ["polling"],
    tryAllTransports: true,
    auth: { token: "t" },
  };
  assert.deepEqual(new io.Socket("/chat", options).options, expected);
  assert.deepEqual(new io.Socket(options).options, expected);
  assert.deepEqual(new io.Socket(null, options).options, expected);
  assert.equal(new io.Socket("/chat", options).url, "/chat");
});

test("the page's server may be another origin", () => {
  const io = extend(client(), { url: "https://rt.example.com/" });
  assert.equal(new io.Socket().url, "https://rt.example.com");
  assert.equal(new io.Socket("/chat").url, "https://rt.example.com/chat");
  assert.equal(new io.Socket("//other.example.com").url, "//other.example.com");
  assert.equal(
    new io.Socket("https://other.example.com/chat").url,
    "https://other.example.com/chat",
  );
});

test("a module namespace is accepted, and a second call changes nothing", () => {
  const io = client();
  const namespace = Object.freeze({ io, Manager: io.Manager, Socket: io.Socket });
  assert.equal(extend(namespace), io);
  const { Socket } = io;
  assert.notEqual(Socket, StubSocket);
  assert.equal(extend(io), io);
  assert.equal(io.Socket, Socket);
});

test("io.Socket is still the official class", () => {
  const io = extend(client());
  const manager = new io.Manager();
  const official = new io.Socket(manager, "/admin", { auth: 1 });
  assert.equal(official.manager, manager);
  assert.equal(official.nsp, "/admin");
  assert.equal(official.constructor, StubSocket);
  assert.equal(official.subscribe, undefined);
  assert.ok(official instanceof io.Socket);
  assert.ok(new io.Socket() instanceof io.Socket);
  assert.ok(io() instanceof io.Socket);

  class Mine extends io.Socket {
    hello() {
      return this.nsp;
    }
  }
  assert.equal(new Mine(manager, "/mine").hello(), "/mine");
  assert.ok(new Mine(manager, "/mine") instanceof io.Socket);
});

test("subscribe sends the channel and calls back with the answer", () => {
  const socket = connected();
  const fn = recorder();
  assert.equal(socket.subscribe("room", fn), socket);
  assert.deepEqual(socket.sent, [["__subscribe__", "room"]]);
  socket.reply(OK);
  assert.deepEqual(fn.calls, [[OK]]);
});

test("unsubscribe sends the channel and calls back with the answer", () => {
  const socket = connected();
  const fn = recorder();
  assert.equal(socket.unsubscribe("room", fn), socket);
  assert.deepEqual(socket.sent, [["__unsubscribe__", "room"]]);
  socket.reply(OK);
  assert.deepEqual(fn.calls, [[OK]]);
});

test("a number is a channel, nothing is not", () => {
  const socket = connected();
  socket.subscribe(7);
  assert.deepEqual(socket.sent, [["__subscribe__", "7"]]);
  for (const channel of [undefined, null, "", {}, () => {}]) {
    assert.throws(() => socket.subscribe(channel), {
      name: "TypeError",
      message: /a channel is a string/,
    });
    assert.throws(() => socket.unsubscribe(channel), {
      name: "TypeError",
      message: /a channel is a string/,
    });
  }
});

test("every connection restores the subscriptions, in order, before the page's listeners", () => {
  const io = extend(client());
  const socket = new io.Socket();
  socket.on("connect", () => socket.emit("page"));
  socket.accept();
  for (const channel of ["b", "a", "10", "__proto__"]) {
    socket.subscribe(channel);
    socket.reply(OK);
  }
  const restored = ["b", "a", "10", "__proto__"].map((channel) => ["__subscribe__", channel]);
  for (let round = 0; round < 2; round += 1) {
    socket.drop();
    socket.accept();
    assert.deepEqual(socket.sent, [...restored, ["page"]]);
  }
});

test("the page's own subscribe on connect costs no second packet", () => {
  const io = extend(client());
  const socket = new io.Socket();
  const fn = recorder();
  socket.on("connect", () => socket.subscribe("room", fn));
  for (let round = 1; round <= 3; round += 1) {
    socket.accept();
    assert.deepEqual(socket.sent, [["__subscribe__", "room"]]);
    socket.reply(OK);
    assert.equal(fn.calls.length, round);
    socket.drop();
  }
});

test("a subscription made offline is sent once, and not by the client's buffer", () => {
  const io = extend(client());
  const socket = new io.Socket();
  const fn = recorder();
  socket.subscribe("room", fn);
  socket.subscribe("room");
  assert.deepEqual(socket.sendBuffer, []);
  socket.accept();
  assert.deepEqual(socket.sent, [["__subscribe__", "room"]]);
  socket.reply(OK);
  assert.deepEqual(fn.calls, [[OK]]);
});

test("what the page sent offline follows the subscriptions", () => {
  const socket = connected();
  socket.subscribe("room");
  socket.reply(OK);
  socket.drop();
  socket.emit("message", "typed while offline");
  socket.subscribe("second");
  socket.accept();
  assert.deepEqual(socket.sent, [
    ["__subscribe__", "room"],
    ["__subscribe__", "second"],
    ["message", "typed while offline"],
  ]);
});

test("a client without that internal method still gets its subscriptions", () => {
  const io = client();
  const create = Object.assign(
    (...args) => Object.assign(io(...args), { emitBuffered: undefined }),
    io,
  );
  create.io = create;
  const { Socket } = extend(create);
  const socket = new Socket();
  socket.subscribe("room");
  socket.connected = true;
  socket.id = "1";
  socket.trigger("connect");
  assert.deepEqual(socket.sent, [["__subscribe__", "room"]]);
});

test("restoring survives socket.off of the page's listeners", () => {
  const socket = connected();
  const fn = recorder();
  socket.off("connect");
  socket.off("disconnect");
  socket.subscribe("answered");
  socket.reply(OK);
  socket.subscribe("waiting", fn);
  socket.drop();
  socket.accept();
  assert.deepEqual(socket.sent, [
    ["__subscribe__", "answered"],
    ["__subscribe__", "waiting"],
  ]);
  socket.reply(OK);
  socket.reply(OK);
  assert.deepEqual(fn.calls, [[OK]]);
});

test("a server that recovers a connection under its old id is asked again", () => {
  const socket = connected();
  const { id } = socket;
  socket.subscribe("room");
  socket.reply(OK);
  socket.drop();
  socket.connections = 0;
  socket.accept();
  assert.equal(socket.id, id);
  assert.deepEqual(socket.sent, [["__subscribe__", "room"]]);
});

test("a page that changes its mind while its subscriptions are being restored", () => {
  const socket = connected();
  for (const channel of ["first", "second", "third"]) {
    socket.subscribe(channel);
    socket.reply(OK);
  }
  socket.drop();
  const { write } = socket;
  socket.write = function (packet) {
    this.write = write;
    this.write(packet);
    socket.unsubscribe("second").subscribe("third");
  };
  socket.accept();
  assert.deepEqual(socket.sent, [
    ["__subscribe__", "first"],
    ["__unsubscribe__", "second"],
    ["__subscribe__", "third"],
  ]);
});

test("a refused subscription is forgotten", () => {
  const socket = connected();
  const fn = recorder();
  socket.subscribe("secret", fn);
  socket.reply(REFUSED);
  assert.deepEqual(fn.calls, [[REFUSED]]);
  socket.drop();
  socket.accept();
  assert.deepEqual(socket.sent, []);
});

test("a subscription that the server takes back is forgotten", () => {
  const socket = connected();
  socket.subscribe("staff");
  socket.reply(OK);
  socket.subscribe("hall");
  socket.reply(OK);
  socket.trigger("__unsubscribe__", "staff", "staff only");
  socket.trigger("__unsubscribe__", "never", "wanted");
  socket.drop();
  socket.accept();
  assert.deepEqual(socket.sent, [["__subscribe__", "hall"]]);
});

test("one that is asked for as the server takes it back has its answer to come", () => {
  const socket = connected();
  const fn = recorder();
  socket.subscribe("staff");
  socket.reply(OK);
  socket.subscribe("staff", fn);
  socket.trigger("__unsubscribe__", "staff", "staff only");
  socket.reply(OK);
  assert.deepEqual(fn.calls, [[OK]]);
  socket.drop();
  socket.accept();
  assert.deepEqual(socket.sent, [["__subscribe__", "staff"]]);
});

test("one that waits to be asked for again is answered as it is taken back", (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const socket = connected();
  const fn = recorder();
  socket.subscribe("staff", fn);
  socket.reply(NOT_NOW);
  socket.trigger("__unsubscribe__", "staff", "staff only");
  assert.deepEqual(fn.calls, [[{ ok: false, error: "staff only" }]]);
  t.mock.timers.tick(10_000);
  assert.deepEqual(socket.sent, [["__subscribe__", "staff"]]);
});

test("a server that cannot say for now is asked again, and fn waits for its word", (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const socket = connected();
  const fn = recorder();
  socket.subscribe("room", fn);
  socket.reply(NOT_NOW);
  assert.equal(socket.sent.length, 1);
  t.mock.timers.tick(2000);
  assert.equal(socket.sent.length, 2);
  socket.reply(NOT_NOW);
  t.mock.timers.tick(2000);
  assert.deepEqual(fn.calls, []);
  socket.reply(OK);
  assert.deepEqual(fn.calls, [[OK]]);
  t.mock.timers.tick(10000);
  assert.equal(socket.sent.length, 3);
});

test("a new connection asks at once, and the old one's time no second time", (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const socket = connected();
  const fn = recorder();
  socket.subscribe("room", fn);
  socket.reply(NOT_NOW);
  socket.drop();
  socket.accept();
  assert.deepEqual(socket.sent, [["__subscribe__", "room"]]);
  socket.reply(OK);
  t.mock.timers.tick(10000);
  assert.equal(socket.sent.length, 1);
  assert.deepEqual(fn.calls, [[OK]]);
});

test("a page that unsubscribes meanwhile is not subscribed later", (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const socket = connected();
  const fn = recorder();
  socket.subscribe("room", fn);
  socket.reply(NOT_NOW);
  socket.unsubscribe("room");
  t.mock.timers.tick(10000);
  assert.deepEqual(socket.sent, [
    ["__subscribe__", "room"],
    ["__unsubscribe__", "room"],
  ]);
  assert.deepEqual(fn.calls, [[ABANDONED]]);
});

test("a subscription refused when it was restored is forgotten", () => {
  const socket = connected();
  socket.subscribe("room");
  socket.reply(OK);
  socket.drop();
  socket.accept();
  socket.reply(REFUSED);
  socket.drop();
  socket.accept();
  assert.deepEqual(socket.sent, []);
});

test("two callbacks of one channel wait for one answer", () => {
  const socket = connected();
  const first = recorder();
  const second = recorder();
  socket.subscribe("room", first);
  socket.subscribe("room", second);
  assert.equal(socket.sent.length, 1);
  socket.reply(REFUSED);
  assert.deepEqual([first.calls, second.calls], [[[REFUSED]], [[REFUSED]]]);
});

test("a callback that throws keeps the answer from nobody", () => {
  const socket = connected();
  const second = recorder();
  socket.subscribe("room", () => {
    throw new Error("in the page");
  });
  socket.subscribe("room", second);
  assert.throws(() => socket.reply(OK), { message: "in the page" });
  assert.deepEqual(second.calls, [[OK]]);
});

test("an answered subscription is asked for again: the server may have ended it", () => {
  const socket = connected();
  const fn = recorder();
  socket.subscribe("room");
  socket.reply(OK);
  socket.subscribe("room", fn);
  assert.equal(socket.sent.length, 2);
  socket.reply(REFUSED);
  assert.deepEqual(fn.calls, [[REFUSED]]);
});

test("an answer lost with the connection comes with the next one, once", async () => {
  const socket = connected();
  const fn = recorder();
  socket.subscribe("room", fn);
  const [lost] = socket.acks;
  socket.drop();
  lost(new Error("socket has been disconnected")); // the client does, with ackTimeout
  await tick();
  assert.deepEqual(fn.calls, []);
  socket.accept();
  assert.deepEqual(socket.sent, [["__subscribe__", "room"]]);
  socket.reply(OK);
  socket.drop();
  socket.accept();
  socket.reply(OK);
  assert.deepEqual(fn.calls, [[OK]]);
});

test("unsubscribe before the subscribe's answer: both are answered, nothing is restored", () => {
  const socket = connected();
  const joined = recorder();
  const left = recorder();
  socket.subscribe("room", joined);
  socket.unsubscribe("room", left);
  assert.deepEqual(socket.sent, [
    ["__subscribe__", "room"],
    ["__unsubscribe__", "room"],
  ]);
  socket.reply(OK);
  socket.reply(OK);
  assert.deepEqual([joined.calls, left.calls], [[[OK]], [[OK]]]);
  socket.drop();
  socket.accept();
  assert.deepEqual(socket.sent, []);
});

test("unsubscribe and the connection lost before either answer", async () => {
  const socket = connected();
  const joined = recorder();
  const left = recorder();
  socket.subscribe("room", joined);
  socket.unsubscribe("room", left);
  socket.drop();
  assert.deepEqual([joined.calls, left.calls], [[], []]); // not inside "disconnect"
  await tick();
  assert.deepEqual([joined.calls, left.calls], [[[ABANDONED]], [[OK]]]);
  socket.accept();
  assert.deepEqual(socket.sent, []);
});

test("subscribe, unsubscribe, subscribe: the last word stands, whatever the first answer", () => {
  const socket = connected();
  const first = recorder();
  const last = recorder();
  socket.subscribe("room", first);
  socket.unsubscribe("room");
  socket.subscribe("room", last);
  assert.deepEqual(
    socket.sent.map(([event]) => event),
    ["__subscribe__", "__unsubscribe__", "__subscribe__"],
  );
  socket.reply(REFUSED);
  socket.reply(OK);
  assert.deepEqual([first.calls, last.calls], [[[REFUSED]], []]);
  socket.reply(OK);
  assert.deepEqual(last.calls, [[OK]]);
  socket.drop();
  socket.accept();
  assert.deepEqual(socket.sent, [["__subscribe__", "room"]]);
});

test("unsubscribe while offline forgets, and says so later", async () => {
  const io = extend(client());
  const socket = new io.Socket();
  const joined = recorder();
  const left = recorder();
  socket.subscribe("room", joined);
  socket.unsubscribe("room", left);
  assert.deepEqual([joined.calls, left.calls], [[], []]);
  await tick();
  assert.deepEqual([joined.calls, left.calls], [[[ABANDONED]], [[OK]]]);
  socket.accept();
  assert.deepEqual([socket.sent, socket.sendBuffer], [[], []]);
});

test("an unsubscribe whose answer was lost with the connection is granted", async () => {
  const socket = connected();
  const left = recorder();
  socket.subscribe("room");
  socket.reply(OK);
  socket.unsubscribe("room", left);
  socket.drop();
  await tick();
  assert.deepEqual(left.calls, [[OK]]);
});

test("a missed ping: the client buffers nothing, the next connection asks once", async () => {
  const socket = connected();
  const joined = recorder();
  const left = recorder();
  socket.stale = true;
  socket.subscribe("room", joined);
  socket.unsubscribe("other", left);
  assert.deepEqual(socket.sendBuffer, []);
  await tick();
  assert.deepEqual([joined.calls, left.calls], [[], [[OK]]]);
  socket.drop();
  socket.accept();
  assert.deepEqual(socket.sent, [["__subscribe__", "room"]]);
  socket.reply(OK);
  assert.deepEqual(joined.calls, [[OK]]);
});

test("with ackTimeout the answer follows an error, and no answer is not a refusal", () => {
  const socket = connected();
  const fn = recorder();
  socket.subscribe("room", fn);
  socket.reply(null, OK);
  socket.subscribe("slow", fn);
  socket.reply(new Error("operation has timed out"));
  assert.deepEqual(fn.calls, [[OK], [{ ok: false, error: "operation has timed out" }]]);
  socket.drop();
  socket.accept();
  assert.deepEqual(socket.sent, [
    ["__subscribe__", "room"],
    ["__subscribe__", "slow"],
  ]);
});

test("a flag that the page chained does not touch the request", () => {
  const socket = connected();
  const seen = [];
  const { emit } = socket;
  socket.emit = function (...args) {
    seen.push(this.flags);
    return emit.apply(this, args);
  };
  socket.flags.volatile = true;
  socket.flags.timeout = 1;
  socket.subscribe("room");
  assert.deepEqual(seen, [{ fromQueue: true }]);
});

test("connect in the old style reaches the client, but not while a CONNECT is out", () => {
  const io = extend(client());
  const socket = new io.Socket();
  assert.equal(socket.connect(), socket);
  assert.equal(socket.connects, 1);
  socket.io.engine.readyState = "open";
  assert.equal(socket.connect(), socket);
  assert.equal(socket.open(), socket);
  assert.equal(socket.connects, 1);
  socket.active = false; // refused, or disconnected by the page
  socket.connect();
  assert.equal(socket.connects, 2);
});

test("the next attempt to reconnect, and no later one, is when the server says", () => {
  const io = extend(client());
  const manager = new StubManager();
  const sockets = [new io.Socket("/a"), new io.Socket("/b")];
  for (const socket of sockets) Object.assign(socket, { io: manager }).accept();
  for (const [delay, max] of [
    [700, 5000],
    [9000, 18000],
    [1000, 5000],
  ]) {
    for (const socket of sockets)
      socket.drop(closed(`service restart; reconnect after ${delay} ms`));
    assert.deepEqual([manager.delay, manager.max], [delay, max]);
    manager.attempt();
    assert.deepEqual([manager.delay, manager.max], [1000, 5000]);
  }
});

test("what else a close says changes nothing about reconnecting", () => {
  const io = extend(client());
  const socket = new io.Socket();
  socket.io = null; // not even touched
  for (const details of [
    undefined,
    null,
    {},
    { description: "transport closed by the server" },
    closed(undefined),
    closed(""),
    closed("server shutting down"),
    closed("reconnect after 1e9 ms"),
    closed("reconnect after 1000000000 ms"),
    closed("reconnect after -5 ms"),
    closed("reconnect after 5 ms, or never"),
  ]) {
    socket.accept();
    socket.drop(details);
  }
});

test("in a page it extends the global io with what its script tag says", () => {
  const attributes = { "data-path": "/rt/", "data-url": "https://rt.example.com" };
  const page = {
    io: client(),
    document: { currentScript: { getAttribute: (name) => attributes[name] ?? null } },
  };
  page.self = page;
  const source = readFileSync(SCRIPT, "utf8");
  vm.runInNewContext(source, page);
  const socket = new page.io.Socket();
  assert.equal(socket.url, "https://rt.example.com");
  assert.equal(socket.options.path, "/rt/");

  page.document.currentScript = null;
  page.io = client();
  vm.runInNewContext(source, page);
  assert.equal(new page.io.Socket().options.path, "/socket.io/");

  delete page.io;
  assert.throws(() => vm.runInNewContext(source, page), {
    message: /load socket\.io\.min\.js before it/,
  });
});
