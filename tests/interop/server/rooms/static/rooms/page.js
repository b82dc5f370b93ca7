// A page as one wrote it for django-socketio 0.3.
var room = document.body.getAttribute("data-room");
var transports = /[?]transports=(\w+)/.exec(location.search);
var socket = transports ? new io.Socket({ transports: [transports[1]] }) : new io.Socket();

socket.connect();

socket.on("connect", function () {
  socket.subscribe("room-" + room, function (reply) {
    document.body.setAttribute("data-state", reply.ok ? "joined" : reply.error);
  });
});

socket.on("message", function (data) {
  var item = document.createElement("li");
  item.textContent = data;
  document.getElementById("log").appendChild(item);
});

socket.on("disconnect", function () {
  document.body.setAttribute("data-state", "disconnected");
});

document.getElementById("form").onsubmit = function () {
  var input = document.getElementById("input");
  socket.send(input.value);
  input.value = "";
  return false;
};
