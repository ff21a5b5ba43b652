// Moves through a history by a clock: play, pause, step, scrub; and reads a trace's file.

import { add, createHistory } from "./history.js";

export const RATES = [1, 2, 5, 10, 30, 100]; // steps a second
const LEAST_TICK_MS = 33;

// A player is at frame `position` of its history. `follow`: it stays at the newest one. `moved()` is told of changes.
export function createPlayer(history, moved) {
  return { history, moved, position: -1, playing: false, follow: false, rate: 5, timer: 0 };
}

export function seek(player, index) {
  const last = player.history.frames.length - 1;
  player.position = Math.max(Math.min(0, last), Math.min(index, last));
  player.follow = false;
  player.moved();
}

export function play(player) {
  if (player.position >= player.history.frames.length - 1) player.position = -1;
  player.playing = true;
  player.follow = false;
  clearTimeout(player.timer);
  tick(player);
}

export function pause(player) {
  player.playing = false;
  clearTimeout(player.timer);
  player.moved();
}

function tick(player) {
  const last = player.history.frames.length - 1;
  const interval = Math.max(LEAST_TICK_MS, 1000 / player.rate);
  player.position = Math.min(last, player.position + Math.max(1, Math.round((interval * player.rate) / 1000)));
  if (player.position >= last) pause(player);
  else {
    player.timer = setTimeout(() => tick(player), interval);
    player.moved();
  }
}

// The history of a trace's text. Throws an Error that names the line that is none of a trace.
export function readTrace(text) {
  const history = createHistory(Infinity);
  text.split("\n").forEach((line, index) => {
    if (!line.trim()) return;
    try {
      const object = JSON.parse(line);
      const format = history.head ? history.head.format : object.format;
      if (format !== "nano-vllm-trace-2")
        throw new Error(`format ${format}: nano-vllm-trace-2 is what this page reads`);
      add(history, object);
    } catch (error) {
      throw new Error(`${index + 1}: ${error.message}`, { cause: error });
    }
  });
  if (!history.frames.length) throw new Error("0 steps");
  return history;
}
