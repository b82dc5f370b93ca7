// The official client against our server, over everything that the contract promises on the wire.

import assert from "node:assert/strict";

import {
  collect,
  connected,
  extension,
  io,
  next,
  open,
  ownServer,
  settled,
  subscribe,
  test,
  unsubscribe,
  URL_OF_SERVER,
  wire,
} from "./support.mjs";

const WEBSOCKET = { transports: ["websocket"] };
const POLLING = { transports: ["polling"] };
const UPGRADE = { transports: ["polling", "websocket"] };

const transportOf = (socket) => socket.io.engine.transport.name;

const TEXTS = [
  "",
  "plain",
  "separator \x1e inside",
  "\x1e",
  'quotes " and \\ and \u2028 and \u0000',
  "ångström – 漢字 – \u{1f9e6}\u200d\u{1f525}",
  '4b6["message",1]',
  "bAQID",
];

// Transports

const COMPRESSION = "ROOMS_COMPRESSION" in process.env;

for (const [name, options] of [
  ["websocket", WEBSOCKET],
  ["an upgrade", UPGRADE],
]) {
  test(`${name}: messages are compressed where the server wants it`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, options);
    if (transportOf(socket) === "polling") await next(socket.io.engine, "upgrade");
    const [extension] = socket.io.engine.transport.ws.extensions.split(";");
    assert.equal(extension, COMPRESSION ? "permessage-deflate" : "");
    for (const size of [0, 1, 100, 1_000, 2_000, 100_000, 300_000]) {
      const value = ["words of it, ".repeat(size / 13), Buffer.alloc(size, "x")];
      assert.deepEqual(await socket.emitWithAck("answer", value), value);
    }
  });
}

for (const [name, options, transport] of [
  ["websocket", WEBSOCKET, "websocket"],
  ["polling", POLLING, "polling"],
]) {
  test(`${name}: messages both ways, in order, through some heartbeats`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, options);
    const pings = collect(socket.io, "ping");
    const messages = collect(socket, "message");
    for (let i = 0; i < 500; i += 1) socket.send(i);
    await messages.reaches(500);
    assert.deepEqual(
      [...messages],
      Array.from({ length: 500 }, (_, i) => i),
    );
    await pings.reaches(3);
    assert.equal(transportOf(socket), transport);
    assert.equal((await socket.emitWithAck("who am i")).transport, transport);
    assert.equal(socket.connected, true);
  });

  test(`${name}: any JSON arrives as it was sent`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, options);
    const values = [
      ...TEXTS,
      null,
      true,
      0,
      -1.5,
      1e21,
      9007199254740991,
      [],
      {},
      [[], [null]],
      { nested: { list: [1, { deep: ["x"] }] }, "key \x1e": "v", __proto__x: 1 },
    ];
    for (const value of values) {
      assert.deepEqual(await socket.emitWithAck("answer", value), value);
      const echoed = next(socket, "message");
      socket.send(value);
      assert.deepEqual(await echoed, [value]);
    }
  });

  test(`${name}: several arguments, none, and undefined`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, options);
    for (const args of [[], [1], [1, "two", { three: [3] }], [null, null]]) {
      const echoed = next(socket, "echoed");
      socket.emit("echo", ...args);
      assert.deepEqual(await echoed, args);
    }
    const echoed = next(socket, "echoed");
    socket.emit("echo", undefined);
    assert.deepEqual(await echoed, [null]);
  });

  test(`${name}: binary both ways, nested, several, empty`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, options);
    const every = Buffer.from(Array.from({ length: 256 }, (_, i) => i));
    const values = [
      Buffer.from([1, 2, 3]),
      Buffer.alloc(0),
      every,
      { a: { b: [Buffer.from("x"), "text", Buffer.alloc(0)] }, c: every },
      Array.from({ length: 10 }, (_, i) => Buffer.alloc(i, i)),
      { _placeholder: false, num: 5, looksLike: "one" },
    ];
    for (const value of values) {
      const echoed = next(socket, "echoed");
      socket.emit("echo", value, "after");
      assert.deepEqual(await echoed, [value, "after"]);
      const message = next(socket, "message");
      socket.send(value);
      assert.deepEqual(await message, [value]);
      assert.deepEqual(await socket.emitWithAck("answer", value), value);
    }
    const echoed = next(socket, "echoed");
    socket.emit("echo", new Uint8Array([7, 8]), new Uint8Array([9]).buffer);
    assert.deepEqual(await echoed, [Buffer.from([7, 8]), Buffer.from([9])]);
  });

  test(`${name}: text and binary interleaved keep their order`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, options);
    const messages = collect(socket, "message");
    const sent = Array.from({ length: 200 }, (_, i) =>
      i % 3 ? i : { n: i, data: Buffer.from(String(i)) },
    );
    sent.forEach((value) => socket.send(value));
    assert.deepEqual([...(await messages.reaches(200))], sent);
  });

  test(`${name}: acknowledgements from the server`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, options);
    assert.equal(await socket.emitWithAck("answer", "one"), "one");
    const several = await new Promise((resolve) =>
      socket.emit("answer", 1, [2], (...args) => resolve(args)),
    );
    assert.deepEqual(several, [1, [2]]);
    assert.deepEqual(await socket.emitWithAck("message", "hello"), "hello");
    const nothing = await new Promise((resolve) =>
      socket.emit("silent", (...args) => resolve(args)),
    );
    assert.ok(
      nothing.length === 0 || (nothing.length === 1 && nothing[0] === null),
      JSON.stringify(nothing),
    );
    const answers = await Promise.all(
      Array.from({ length: 100 }, (_, i) => socket.emitWithAck("answer", i)),
    );
    assert.deepEqual(
      answers,
      Array.from({ length: 100 }, (_, i) => i),
    );
  });

  test(`${name}: acknowledgements from the client, binary included`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, options);
    socket.on("question", (...args) => args.pop()({ heard: args }));
    for (const args of [[], ["why"], [Buffer.from([1]), { deep: Buffer.alloc(0) }]]) {
      assert.deepEqual(await socket.emitWithAck("call me", ...args), {
        said: { heard: args },
      });
    }
  });

  test(`${name}: an event that nobody handles is no fault`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, options);
    socket.emit("nobody", "listens", Buffer.from([1]));
    for (const lifecycle of ["on_connect", "finish", "subscribe", "error"])
      socket.emit(lifecycle, "x");
    assert.equal(await socket.emitWithAck("answer", "still here"), "still here");
  });

  test(`${name}: large messages both ways`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, options);
    const text = "0123456789".repeat(90_000);
    // In a polling payload base64 adds a third.
    const binary = Buffer.alloc(options === POLLING ? 675_000 : 900_000, "binary");
    const multibyte = "漢".repeat(300_000);
    for (const value of [text, binary, multibyte]) {
      const message = next(socket, "message");
      socket.send(value);
      assert.deepEqual(await message, [value]);
    }
  });

  test(`${name}: volatile messages arrive while the transport is writable`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, options);
    await settled(socket);
    // Polling is not writable while a POST is under way.
    while (!socket.io.engine.transport.writable) await next(socket.io.engine, "drain");
    const message = next(socket, "message");
    socket.volatile.send("now or never");
    assert.deepEqual(await message, ["now or never"]);
  });

  test(`${name}: auth and a query reach the server`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, {
      ...options,
      auth: { token: "漢\x1e" },
      query: { a: "b c" },
    });
    assert.deepEqual((await socket.emitWithAck("who am i")).auth, { token: "漢\x1e" });
  });

  test(`${name}: the client's disconnect and the server's`, async (t) => {
    const socket = await connected(t, URL_OF_SERVER, options);
    let disconnected = next(socket, "disconnect");
    socket.emit("disconnect me");
    assert.equal((await disconnected)[0], "io server disconnect");
    assert.equal(socket.active, false);

    const again = next(socket, "connect");
    socket.connect();
    await again;
    assert.equal(await socket.emitWithAck("answer", 1), 1);
    disconnected = next(socket, "disconnect");
    socket.disconnect();
    assert.equal((await disconnected)[0], "io client disconnect");
  });

  test(`${name}: two namespaces on one connection`, async (t) => {
    const root = await connected(t, URL_OF_SERVER, options);
    const second = root.io.socket("/second");
    await next(second, "connect");
    const [here, there] = await Promise.all([
      root.emitWithAck("who am i"),
      second.emitWithAck("who am i"),
    ]);
    assert.equal(here.namespace, "/");
    assert.equal(there.namespace, "/second");
    assert.notEqual(here.id, there.id);

    const heard = collect(root, "message");
    const message = next(second, "message");
    second.send({ to: "second", data: Buffer.from([1]) });
    assert.deepEqual(await message, [{ to: "second", data: Buffer.from([1]) }]);

    second.disconnect();
    assert.equal(await root.emitWithAck("answer", "the other lives"), "the other lives");
    assert.deepEqual([...heard], []);
    second.connect();
    await next(second, "connect");
    assert.equal((await second.emitWithAck("who am i")).namespace, "/second");
  });

  test(`${name}: a namespace that does not exist is refused`, async (t) => {
    const socket = open(t, `${URL_OF_SERVER}/nowhere`, options);
    const [error] = await next(socket, "connect_error");
    assert.equal(error.message, "Invalid namespace");
    assert.equal(socket.active, false);
  });

  test(`${name}: a connection is refused with data`, async (t) => {
    const socket = open(t, `${URL_OF_SERVER}/refused`, options);
    socket.on("connect", () => assert.fail("connected"));
    const [error] = await next(socket, "connect_error");
    assert.equal(error.message, "not today");
    assert.deepEqual(error.data, { retry: false, after: [1, 2] });
    assert.equal(socket.active, false);

    const denied = socket.io.socket("/denied");
    denied.connect();
    const [reason] = await next(denied, "connect_error");
    assert.match(reason.message, /not you/);

    const falsy = open(t, `${URL_OF_SERVER}/falsy`, options);
    falsy.on("connect", () => assert.fail("connected"));
    assert.ok((await next(falsy, "connect_error"))[0].message);
  });

  test(`${name}: a refused namespace leaves the others alone`, async (t) => {
    const root = await connected(t, URL_OF_SERVER, options);
    const refused = root.io.socket("/refused");
    await next(refused, "connect_error");
    assert.equal(await root.emitWithAck("answer", 1), 1);
  });

  test(`${name}: the client comes back after its connection was cut`, async (t) => {
    const link = await wire(t);
    const socket = await connected(t, link.url, options);
    for (let round = 0; round < 3; round += 1) {
      const { id } = socket;
      const disconnected = next(socket, "disconnect");
      const reconnected = next(socket, "connect");
      link.down();
      await disconnected;
      socket.send(`offline ${round}`);
      const message = next(socket, "message");
      link.up();
      await reconnected;
      assert.notEqual(socket.id, id);
      assert.deepEqual(await message, [`offline ${round}`]);
    }
  });
}

test("polling: a burst over maxPayload is split and arrives whole", async (t) => {
  const socket = await connected(t, URL_OF_SERVER, POLLING);
  const texts = Array.from({ length: 40 }, (_, i) => "x".repeat(90_000 + i));
  const lengths = await Promise.all(texts.map((text) => socket.emitWithAck("length", text)));
  assert.deepEqual(
    lengths,
    texts.map((text) => text.length),
  );
});

test("polling: a burst of very many small packets is one payload and arrives whole", async (t) => {
  const socket = await connected(t, URL_OF_SERVER, POLLING);
  const messages = collect(socket, "message");
  for (let i = 0; i < 5000; i += 1) socket.send(i);
  await messages.reaches(5000);
  assert.deepEqual(
    [...messages],
    Array.from({ length: 5000 }, (_, i) => i),
  );
});

test("a message over maxPayload ends that connection only", async (t) => {
  for (const options of [WEBSOCKET, POLLING]) {
    const neighbour = await connected(t, URL_OF_SERVER, options);
    const socket = await connected(t, URL_OF_SERVER, { ...options, reconnection: false });
    const disconnected = next(socket, "disconnect");
    socket.send("x".repeat(1_100_000));
    await disconnected;
    assert.equal(await neighbour.emitWithAck("answer", 1), 1);
  }
});

test("upgrade: nothing is lost or reordered while the transport changes", async (t) => {
  // The delay is there so that messages are under way on polling meanwhile.
  const link = await wire(t, { webSocketDelay: 30 });
  for (let round = 0; round < 10; round += 1) {
    const socket = open(t, link.url, UPGRADE);
    const ticks = collect(socket, "tick");
    let sent = 0;
    let atUpgrade;
    socket.io.engine.once("upgrade", () => {
      atUpgrade = { ticks: ticks.length, sent };
    });
    socket.emit("start ticking");
    await next(socket, "connect");
    for (let after = 0; after < 30 && sent < 10_000; after += atUpgrade ? 1 : 0) {
      socket.emit("note", sent);
      sent += 1;
      await new Promise((resolve) => (sent % 4 ? setImmediate(resolve) : setTimeout(resolve, 1)));
    }
    const count = await socket.emitWithAck("stop ticking");
    const notes = await socket.emitWithAck("notes");
    assert.deepEqual(
      notes,
      Array.from({ length: sent }, (_, i) => i),
    );
    assert.deepEqual(
      [...ticks],
      Array.from({ length: count }, (_, i) => i),
    );
    assert.ok(atUpgrade.ticks > 0 && atUpgrade.sent > 0, "the upgrade came before the messages");
    assert.ok(atUpgrade.ticks < count, "the messages ended before the upgrade");
    assert.equal(transportOf(socket), "websocket");
    assert.equal((await socket.emitWithAck("who am i")).transport, "websocket");
    socket.disconnect();
  }
});

test("upgrade: large and binary messages under way while the transport changes", async (t) => {
  const link = await wire(t, { webSocketDelay: 30 });
  const socket = open(t, link.url, UPGRADE);
  const upgraded = next(socket.io.engine, "upgrade");
  const messages = collect(socket, "message");
  await next(socket, "connect");
  const sent = Array.from({ length: 24 }, (_, i) =>
    i % 2 ? Buffer.alloc(20_000, i) : `${i}${"y".repeat(20_000)}`,
  );
  for (const value of sent) {
    socket.send(value);
    await new Promise((resolve) => setImmediate(resolve));
  }
  await upgraded;
  assert.deepEqual([...(await messages.reaches(sent.length))], sent);
  assert.equal(transportOf(socket), "websocket");
});

test("fallback: where no WebSocket gets through, the client goes on with polling", async (t) => {
  const link = await wire(t, { refuseWebSocket: true });
  const socket = await connected(t, link.url, {}, extension);
  assert.equal(transportOf(socket), "polling");
  assert.equal((await socket.emitWithAck("who am i")).transport, "polling");
});

test("upgrade: one that fails costs nothing", async (t) => {
  const link = await wire(t, { refuseWebSocket: true });
  const socket = open(t, link.url, UPGRADE);
  const messages = collect(socket, "message");
  const failed = next(socket.io.engine, "upgradeError");
  for (let i = 0; i < 50; i += 1) socket.send(i);
  await failed;
  for (let i = 50; i < 100; i += 1) socket.send(i);
  await messages.reaches(100);
  assert.deepEqual(
    [...messages],
    Array.from({ length: 100 }, (_, i) => i),
  );
  assert.equal(transportOf(socket), "polling");
});

test("the client comes back after the server was restarted, with its subscriptions", async (t) => {
  const server = await ownServer(t);
  const socket = await connected(t, server.url, {}, extension);
  const poller = await connected(t, server.url, POLLING, extension);
  assert.deepEqual(await subscribe(socket, "lasting"), { ok: true });
  assert.deepEqual(await subscribe(poller, "lasting"), { ok: true });
  for (const signal of ["SIGTERM", "SIGKILL"]) {
    const gone = Promise.all([next(socket, "disconnect"), next(poller, "disconnect")]);
    const back = Promise.all([next(socket, "connect"), next(poller, "connect")]);
    await server.stop(signal);
    await gone;
    await server.start();
    await back;
    assert.deepEqual((await socket.emitWithAck("who am i")).channels, ["lasting"]);
    assert.deepEqual((await poller.emitWithAck("who am i")).channels, ["lasting"]);
    const heard = next(poller, "message");
    socket.emit("broadcast channel", "welcome back", "lasting");
    assert.deepEqual(await heard, ["welcome back"]);
  }
});

// The extension

test("io.Socket: websocket first, and the old connect() is harmless", async (t) => {
  const socket = open(t, URL_OF_SERVER, {}, extension);
  const packets = collect(socket.io, "packet");
  socket.connect();
  await next(socket, "connect");
  socket.connect();
  assert.equal(transportOf(socket), "websocket");
  await settled(socket);
  assert.equal(packets.filter((packet) => packet.type === 0).length, 1);
  assert.ok(socket instanceof io.Socket);
});

test("io.Socket: the old connect() is harmless on a shared connection too", async (t) => {
  const root = await connected(t, URL_OF_SERVER, { forceNew: false }, extension);
  const second = extension(`${URL_OF_SERVER}/second`);
  t.after(() => second.disconnect());
  assert.equal(second.io, root.io);
  const packets = collect(root.io, "packet");
  second.connect();
  await next(second, "connect");
  await settled(second);
  assert.equal(packets.filter((packet) => packet.type === 0).length, 1);
});

test("a subscription that is taken back, and not restored", async (t) => {
  const socket = await connected(t, URL_OF_SERVER, {}, extension);
  const channels = async () => (await socket.emitWithAck("who am i")).channels;
  assert.deepEqual(await subscribe(socket, "probation"), { ok: true });
  assert.deepEqual(await subscribe(socket, "one"), { ok: true });
  socket.emit("decide again");
  assert.deepEqual(await next(socket, "__unsubscribe__"), ["probation", "no longer"]);
  assert.deepEqual(await channels(), ["one"]);
  socket.io.engine.close();
  await next(socket, "connect");
  assert.deepEqual(await channels(), ["one"]);
});

test("subscribe, unsubscribe, refused", async (t) => {
  const socket = await connected(t, URL_OF_SERVER, {}, extension);
  const channels = async () => (await socket.emitWithAck("who am i")).channels;
  assert.deepEqual(await subscribe(socket, "one"), { ok: true });
  assert.deepEqual(await subscribe(socket, "two – 漢"), { ok: true });
  assert.deepEqual(await channels(), ["one", "two – 漢"]);
  assert.deepEqual(await subscribe(socket, "one"), { ok: true });
  assert.deepEqual(await channels(), ["one", "two – 漢"]);
  assert.deepEqual(await unsubscribe(socket, "one"), { ok: true });
  assert.deepEqual(await channels(), ["two – 漢"]);

  const refused = await subscribe(socket, "secret plans");
  assert.equal(refused.ok, false);
  assert.match(refused.error, /members only/);
  const silently = await subscribe(socket, "closed");
  assert.equal(silently.ok, false);
  assert.equal(typeof silently.error, "string");
  assert.deepEqual(await channels(), ["two – 漢"]);

  socket.emit("put me out", "two – 漢");
  assert.deepEqual(await channels(), []);
  assert.deepEqual(await subscribe(socket, "two – 漢"), { ok: true });
  assert.deepEqual(await channels(), ["two – 漢"]);
});

test("any official client subscribes with the two wire events", async (t) => {
  const socket = await connected(t);
  assert.deepEqual(await socket.emitWithAck("__subscribe__", "plain"), { ok: true });
  assert.deepEqual((await socket.emitWithAck("who am i")).channels, ["plain"]);
  assert.deepEqual(await socket.emitWithAck("__unsubscribe__", "plain"), { ok: true });
  assert.deepEqual((await socket.emitWithAck("who am i")).channels, []);
  for (const channel of [undefined, null, 5, {}, ["a"]]) {
    const reply = await socket.emitWithAck("__subscribe__", channel);
    assert.equal(reply.ok, false);
    assert.equal(typeof reply.error, "string");
  }
  socket.emit("__subscribe__", "unasked");
  assert.deepEqual((await socket.emitWithAck("who am i")).channels, ["unasked"]);
});

test("a broadcast to a channel reaches its members, not the sender, nor anyone else", async (t) => {
  const [sender, member, polling, both, outsider] = await Promise.all([
    connected(t, URL_OF_SERVER, {}, extension),
    connected(t, URL_OF_SERVER, {}, extension),
    connected(t, URL_OF_SERVER, POLLING, extension),
    connected(t, URL_OF_SERVER, {}, extension),
    connected(t, URL_OF_SERVER, {}, extension),
  ]);
  for (const socket of [sender, member, polling, both]) await subscribe(socket, "news");
  for (const socket of [sender, both]) await subscribe(socket, "sport");
  const everyone = [sender, member, polling, both, outsider];
  const heard = everyone.map((socket) => collect(socket, "message"));

  const payload = { text: "to the channel", data: Buffer.from([1, 2]) };
  sender.emit("broadcast channel", payload, "news");
  sender.emit("broadcast channel", "to all channels of the sender, one copy each");
  sender.emit("broadcast", "to all");
  await Promise.all(
    heard.slice(1).map((messages) => messages.reaches(messages === heard[4] ? 1 : 3)),
  );
  // In one process nothing can come after these any more once each of them has had an answer.
  await Promise.all(everyone.map(settled));
  const all = [payload, "to all channels of the sender, one copy each", "to all"];
  assert.deepEqual(
    heard.map((messages) => [...messages]),
    [[], all, all, all, ["to all"]],
  );

  await unsubscribe(member, "news");
  sender.emit("broadcast channel", "after leaving", "news");
  await heard[2].reaches(4);
  await Promise.all(everyone.map(settled));
  assert.deepEqual(
    heard.map((messages) => messages.length),
    [0, 3, 4, 4, 1],
  );
});

test("a channel of one namespace is not the channel of that name in another", async (t) => {
  const root = await connected(t, URL_OF_SERVER, {}, extension);
  const other = await connected(t, URL_OF_SERVER, {}, extension);
  const second = root.io.socket("/second");
  assert.deepEqual(await subscribe(root, "shared name"), { ok: true });
  assert.deepEqual(await second.emitWithAck("__subscribe__", "shared name"), { ok: true });
  const there = collect(second, "message");
  const here = next(root, "message");
  other.emit("broadcast channel", "to the root's", "shared name");
  assert.deepEqual(await here, ["to the root's"]);
  await settled(second);
  assert.deepEqual([...there], []);

  assert.deepEqual(await unsubscribe(root, "shared name"), { ok: true });
  assert.deepEqual((await second.emitWithAck("who am i")).channels, ["shared name"]);
});

test("a refused subscription hears nothing, before or after", async (t) => {
  const socket = await connected(t, URL_OF_SERVER, {}, extension);
  const other = await connected(t, URL_OF_SERVER, {}, extension);
  const heard = collect(socket, "message");
  const answered = subscribe(socket, "secret");
  for (let i = 0; i < 20; i += 1) other.emit("broadcast channel", i, "secret");
  assert.equal((await answered).ok, false);
  await settled(other);
  await settled(socket);
  assert.deepEqual([...heard], []);
});

test("every reconnect restores the subscriptions, ahead of what was sent offline", async (t) => {
  for (const options of [WEBSOCKET, POLLING]) {
    const link = await wire(t);
    const room = `room-${options.transports[0]}`;
    const socket = await connected(t, link.url, options, extension);
    const outgoing = [];
    socket.onAnyOutgoing((event, ...args) => outgoing.push([event, args[0]]));
    socket.on("connect", () => socket.subscribe(room));
    await subscribe(socket, room);
    await subscribe(socket, "secret");
    for (let round = 0; round < 3; round += 1) {
      const disconnected = next(socket, "disconnect");
      link.down();
      await disconnected;
      outgoing.length = 0;
      const text = `typed while offline ${round}`;
      const heard = next(socket, "message");
      const back = next(socket, "connect");
      socket.send(text);
      link.up();
      await back;
      assert.deepEqual(await heard, [text]); // from the handler of the room's messages
      assert.deepEqual(outgoing, [
        ["__subscribe__", room],
        ["message", text],
      ]);
      assert.deepEqual((await socket.emitWithAck("who am i")).channels, [room]);
    }
  }
});

test("an answer that was lost with the connection comes with the next one, once", async (t) => {
  const link = await wire(t);
  const socket = await connected(t, link.url, {}, extension);
  const replies = [];
  let answered;
  const first = new Promise((resolve) => {
    answered = resolve;
  });
  const disconnected = next(socket, "disconnect");
  socket.subscribe("room", (reply) => {
    replies.push(reply);
    answered();
  });
  link.cut();
  await disconnected;
  assert.deepEqual(replies, []);
  await first;
  await settled(socket);
  assert.deepEqual(replies, [{ ok: true }]);
});

test("what the page wanted offline is what it gets", async (t) => {
  const socket = open(t, URL_OF_SERVER, { autoConnect: false }, extension);
  const kept = subscribe(socket, "kept");
  const dropped = subscribe(socket, "dropped");
  assert.deepEqual(await unsubscribe(socket, "dropped"), { ok: true });
  assert.equal((await dropped).ok, false);
  socket.connect();
  assert.deepEqual(await kept, { ok: true });
  assert.deepEqual((await socket.emitWithAck("who am i")).channels, ["kept"]);
});

test("options of the official client that change acknowledgements and resending", async (t) => {
  const link = await wire(t);
  const socket = await connected(t, link.url, { ackTimeout: 10_000, retries: 3 }, extension);
  const outgoing = [];
  socket.onAnyOutgoing((event, ...args) => outgoing.push([event, args[0]]));
  assert.deepEqual(await subscribe(socket, "room"), { ok: true });
  const back = next(socket, "connect");
  link.cut();
  await back;
  await settled(socket);
  assert.deepEqual((await socket.emitWithAck("who am i"))?.channels, ["room"]);
  assert.equal(outgoing.filter(([event]) => event === "__subscribe__").length, 2);
});
