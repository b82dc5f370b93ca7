/*
 * django-socketio's extension of the official Socket.IO client: io.Socket with channels.
 *
 *   var socket = new io.Socket();            // or ([url][, options]), the official client's own
 *   socket.on("connect", function () { socket.subscribe("room-1"); });
 *   socket.on("message", function (data) { ... });
 *   socket.send({ hello: "room" });
 *
 * The socket is the official one, with everything the official documentation says of it, and with
 *
 *   socket.subscribe(channel[, fn])
 *   socket.unsubscribe(channel[, fn])
 *
 * where fn gets the server's answer, once: {ok: true} or {ok: false, error: "..."}. What a page
 * subscribed to is asked for again on every new connection, ahead of what the page itself sends on
 * it, until the page unsubscribes or the server refuses. A server that only cannot say for now
 * answers {ok: false, retry: true, ...}: it is asked again, and fn waits for its last word. A server
 * that takes a subscription back sends the event "__unsubscribe__" with the channel and the reason,
 * which a page may listen to: the channel is then not asked for again.
 *
 * A server that is restarted tells its WebSockets after how long to come back, so that not all of
 * them do so at once. The next attempt, and no later one, waits for about that long.
 *
 * In a page, load it after socket.io.min.js; its script tag may carry data-path (where the server
 * answers, "/socket.io/") and data-url (the server's origin, where it is not the page's). Under
 * Node, require() gives a function that extends the socket.io-client module it is handed, with
 * {path, url} as an optional second argument.
 *
 * Plain ES5 with no dependency. Of the client's internals it touches three, each named where it is
 * used (flags, sendBuffer, emitBuffered): names that the client's minified build keeps.
 */
(function (root) {
  "use strict";

  var SUBSCRIBE = "__subscribe__";
  var UNSUBSCRIBE = "__unsubscribe__";
  var RETRY = 1000; // milliseconds, and up to twice that
  var RETURN = /\breconnect after (\d{1,6}) ms$/; // in the reason of a WebSocket's close

  /* Give the client an io.Socket that connects to Django. */
  function extend(client, defaults) {
    var io = client.io || client;
    var Official = io.Socket;
    if (Official.official) {
      return io; // the script was loaded twice
    }
    defaults = defaults || {};

    function Socket(url, options) {
      if (url instanceof io.Manager) {
        return construct(Official, this, arguments);
      }
      if (url && typeof url === "object") {
        options = url;
        url = undefined;
      }
      return withChannels(io(resolve(url, defaults.url), withDefaults(options, defaults.path)));
    }

    // The same prototype: who tests `instanceof io.Socket`, or adds a method, means all sockets.
    Socket.prototype = Official.prototype;
    Socket.official = Official;
    io.Socket = Socket;
    return io;
  }

  /* Stand in for the official constructor, new Socket(manager, namespace, options), and super(). */
  function construct(Official, instance, args) {
    if (typeof Reflect === "object") {
      var target = instance instanceof Official ? instance.constructor : Official;
      return Reflect.construct(Official, args, target);
    }
    return new Official(args[0], args[1], args[2]);
  }

  /* Place a bare namespace, or no address at all, on the server that the script tag names. */
  function resolve(url, origin) {
    if (!origin || (url && !/^\/(?!\/)/.test(url))) {
      return url;
    }
    return origin.replace(/\/+$/, "") + (url || "");
  }

  function withDefaults(options, path) {
    var merged = {
      path: path || "/socket.io/",
      // WebSocket first; polling where a proxy or an old network swallows it.
      transports: ["websocket", "polling"],
      tryAllTransports: true
    };
    for (var name in options) {
      if (Object.prototype.hasOwnProperty.call(options, name)) {
        merged[name] = options[name];
      }
    }
    return merged;
  }

  /*
   * Add the channels to one official socket.
   *
   * A subscription lives in `wanted` from the page's call until the page unsubscribes or the server
   * refuses it: that is what every new connection asks for. Calls that find the question already
   * asked on this connection wait for its answer, so the page's own on("connect", subscribe) costs
   * no second packet. One that was answered is asked again if the page calls again: the server may
   * have ended it meanwhile, and only the server knows.
   *
   * Nothing is left to the official client's offline buffer: it would send the same subscription
   * beside ours.
   */
  function withChannels(socket) {
    // By key(channel): {channel, callbacks, asked}; asked = sent on this connection, not answered.
    var wanted = {};
    var unanswered = []; // the requests of this connection whose answer is still out
    var connection; // id of the connection that `wanted` was asked for on

    socket.subscribe = function (channel, fn) {
      channel = checked(channel);
      var subscription = wanted[key(channel)];
      if (!subscription) {
        subscription = wanted[key(channel)] = { channel: channel, callbacks: [], asked: false };
      }
      if (typeof fn === "function") {
        subscription.callbacks.push(fn);
      }
      if (!subscription.asked) {
        ask(subscription);
      }
      return socket;
    };

    socket.unsubscribe = function (channel, fn) {
      channel = checked(channel);
      var subscription = wanted[key(channel)];
      var callbacks = typeof fn === "function" ? [fn] : [];
      delete wanted[key(channel)];
      if (subscription && !subscription.asked) {
        abandon(subscription);
      }

      // A connection takes its subscriptions with it: the wish is granted, answered or not.
      function gone() {
        answerLater(callbacks, { ok: true });
      }
      var left = request(
        UNSUBSCRIBE,
        channel,
        function (reply) {
          answer(callbacks, reply);
        },
        gone
      );
      if (!left) {
        gone();
      }
      return socket;
    };

    function ask(subscription) {
      subscription.asked = true;
      clearTimeout(subscription.later);
      var left = request(
        SUBSCRIBE,
        subscription.channel,
        function (reply, refused) {
          subscription.asked = false;
          if (refused && reply.retry === true && isWanted(subscription)) {
            askLater(subscription);
            return;
          }
          if (refused && isWanted(subscription)) {
            delete wanted[key(subscription.channel)];
          }
          answer(subscription.callbacks, reply);
        },
        function () {
          subscription.asked = false; // the next connection asks, for the same callbacks
          if (!isWanted(subscription)) {
            abandon(subscription);
          }
        }
      );
      if (!left) {
        subscription.asked = false;
      }
    }

    function askLater(subscription) {
      subscription.later = setTimeout(function () {
        if (isWanted(subscription)) {
          ask(subscription);
        }
      }, RETRY * (1 + Math.random()));
    }

    /* The server has ended a subscription. One that is asked for meanwhile has its answer to come. */
    function expelled(channel, error) {
      var subscription = wanted[key(channel)];
      if (subscription && !subscription.asked) {
        clearTimeout(subscription.later);
        delete wanted[key(channel)];
        answer(subscription.callbacks, { ok: false, error: error });
      }
    }

    /* Whether the page still wants this subscription, not a later one to the same channel. */
    function isWanted(subscription) {
      return wanted[key(subscription.channel)] === subscription;
    }

    function abandon(subscription) {
      answerLater(subscription.callbacks, {
        ok: false,
        error: "unsubscribed before the server answered"
      });
    }

    /*
     * Send a request on this connection; return false, with no trace left, where there is none.
     * Of a request that was sent, either answered(reply, refused) or lost() is called, once.
     */
    function request(event, channel, answered, lost) {
      if (!socket.connected) {
        return false;
      }
      var entry = { lost: lost };
      var buffered = socket.sendBuffer.length;
      unanswered.push(entry);
      // `flags`: neither volatile nor with a timeout, whatever the page chained before; and
      // fromQueue keeps it out of the queue of the option `retries`, which would send it a second
      // time after a reconnect.
      socket.flags = { fromQueue: true };
      socket.emit(event, channel, function () {
        // The last argument: with the option `ackTimeout` an error, or null, comes first.
        var reply = arguments[arguments.length - 1];
        if (!remove(unanswered, entry)) {
          return;
        }
        if (reply instanceof Error) {
          // No answer in time, which is not a refusal.
          answered({ ok: false, error: reply.message }, false);
        } else {
          answered(reply, Boolean(reply) && reply.ok === false);
        }
      });
      if (socket.sendBuffer.length > buffered) {
        // `sendBuffer`: after a missed ping the client fills it although `connected` is still
        // true. "disconnect" is next.
        socket.sendBuffer.pop();
        remove(unanswered, entry);
        return false;
      }
      return true;
    }

    function lose() {
      connection = undefined;
      unanswered.splice(0).forEach(function (entry) {
        entry.lost();
      });
    }

    /* Ask for everything wanted, once on each connection. */
    function restore() {
      if (connection === socket.id) {
        return;
      }
      lose(); // for pages that took our "disconnect" listener away with socket.off("disconnect")
      connection = socket.id;
      Object.keys(wanted).forEach(function (name) {
        // A callback may have run since the list was made.
        if (wanted[name] && !wanted[name].asked) {
          ask(wanted[name]);
        }
      });
    }

    // First of the listeners, ahead of the page's own.
    socket.on("connect", restore);
    socket.on("disconnect", lose);
    socket.on(UNSUBSCRIBE, expelled);
    socket.on("disconnect", function (reason, details) {
      returnWhenTold(socket.io, details);
    });

    // `emitBuffered` sends what the page sent while offline, before "connect" is emitted. A message
    // must not arrive ahead of its channel's subscription: the server's handlers for that channel
    // would not hear it.
    var emitBuffered = socket.emitBuffered;
    if (emitBuffered) {
      socket.emitBuffered = function () {
        restore();
        emitBuffered.call(socket);
      };
    }

    // In the old style a page calls connect() on a socket that connects by itself. With the
    // transport open and the server's answer still out, the official method would send a second
    // CONNECT packet, a fault in the protocol.
    var connect = socket.connect;
    socket.connect = socket.open = function () {
      var engine = socket.io.engine;
      return socket.active && engine && engine.readyState === "open"
        ? socket
        : connect.call(socket);
    };

    return socket;
  }

  /*
   * Have the client's next attempt to reconnect wait for as long as the server says.
   *
   * The client makes it when this listener has returned. It waits for `reconnectionDelay`, more or
   * less by its `randomizationFactor`.
   */
  function returnWhenTold(manager, details) {
    var close = (details && details.context) || {};
    var told = RETURN.exec(close.reason || "");
    var delay = told && Number(told[1]);
    var usual = told && manager.reconnectionDelay();
    if (!told || usual === delay) {
      return; // or another socket of this connection has been here
    }
    var longest = manager.reconnectionDelayMax();
    manager.reconnectionDelay(delay);
    manager.reconnectionDelayMax(Math.max(longest, 2 * delay));
    manager.once("reconnect_attempt", function () {
      manager.reconnectionDelay(usual);
      manager.reconnectionDelayMax(longest);
    });
  }

  function checked(channel) {
    if (typeof channel === "number") {
      return String(channel);
    }
    if (typeof channel !== "string" || !channel) {
      throw new TypeError('a channel is a string of at least one character, not "' + channel + '"');
    }
    return channel;
  }

  /* A property name that is never an index, or one with a meaning of its own like "__proto__". */
  function key(channel) {
    return "$" + channel;
  }

  function remove(list, item) {
    var index = list.indexOf(item);
    if (index === -1) {
      return false;
    }
    list.splice(index, 1);
    return true;
  }

  /* Call every callback once; one that throws does not keep the answer from the others. */
  function answer(callbacks, reply) {
    var due = callbacks.splice(0);
    (function next() {
      if (due.length) {
        try {
          due.shift()(reply);
        } finally {
          next();
        }
      }
    })();
  }

  /* Like the server's answers, our own never come before the page's call has returned. */
  function answerLater(callbacks, reply) {
    var due = callbacks.splice(0);
    if (due.length) {
      setTimeout(function () {
        answer(due, reply);
      }, 0);
    }
  }

  if (typeof module === "object" && module.exports) {
    module.exports = extend;
  } else {
    if (!root.io) {
      throw new Error(
        "socketio.js extends the official Socket.IO client: load socket.io.min.js before it."
      );
    }
    // Known only while the script runs, and not at all in a module or a worker.
    var script = (typeof document === "object" && document.currentScript) || null;
    extend(root.io, {
      path: script && script.getAttribute("data-path"),
      url: script && script.getAttribute("data-url")
    });
  }
})(typeof self === "undefined" ? this : self);
