// The front page: the rooms and how many are in each, kept up to date.

import { avatar, byId } from "./dom.js";

const list = byId("rooms");

function cardOf(slug) {
  return Array.from(list.children).find((card) => card.dataset.slug === slug);
}

function show(room) {
  let card = cardOf(room.slug);
  if (!card) {
    card = byId("card").content.firstElementChild.cloneNode(true);
    card.dataset.slug = room.slug;
    list.append(card);
  }
  card.querySelector("a").href = room.url;
  card.querySelector(".card-name").textContent = room.name;
  card.querySelector("[data-count]").textContent = room.count ? `${room.count} here now` : "Nobody here";
  card.querySelector("[data-people]").replaceChildren(...room.people.map(avatar));
  const icon = card.querySelector(".avatar-room");
  icon.className = `avatar avatar-room hue-${Number(room.hue)}`;
  icon.textContent = room.initials;
  byId("no-rooms").hidden = true;
}

function hide(slug) {
  cardOf(slug)?.remove();
  byId("no-rooms").hidden = list.children.length > 0;
}

function showAll(rooms) {
  const slugs = new Set(rooms.map((room) => room.slug));
  Array.from(list.children).forEach((card) => slugs.has(card.dataset.slug) || hide(card.dataset.slug));
  rooms.forEach(show);
}

const socket = new io.Socket();

// First the channel, then the state of things: no change in between is missed.
socket.on("connect", () => socket.subscribe("lobby", () => socket.emit("rooms", showAll)));

socket.on("message", (data) => {
  if (data.type === "room") show(data);
  if (data.type === "closed") hide(data.slug);
});
