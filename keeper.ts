/**
 * The keeper's process, of which a server in a cluster has one beside its workers. It begins with the lock of the root, and
 * ends as the supervisor says, or with what it cannot go on after: the next one looks at everything anew. What it does in
 * between is in cluster.ts.
 */
import { mkdirSync } from "node:fs";
import { isStateless, Keeper } from "./cluster.ts";
import { say } from "./command.ts";
import { sleep } from "./connection.ts";
import { Held, openLocked } from "./disk.ts";
import type { ForKeeper, FromKeeper, KeeperSettings } from "./hub.ts";
import { logBug } from "./log.ts";
import { quote } from "./protocol.ts";

const LOCK_FILE = "keeper";
const LOCK_RETRY_MS = 50;
const LOCK_TRIES_UNSAID = 40;

/** Runs the keeper until the supervisor ends it. */
export async function keep(settings: KeeperSettings): Promise<void> {
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(signal, () => {});
  const stop = () => process.exit(0);
  let keeper: ReturnType<typeof keeperOf> | undefined;
  // Whoever says so: see server.ts.
  process.on("exit", (status) => status === 0 && keeper?.close());
  // Nothing but an order to end comes before it has said that it is ready.
  process.on("message", (message: ForKeeper | "drain" | "stop") => {
    if (message === "stop") stop();
    else if (message === "drain") keeper?.drain();
    else keeper?.onMessage(message);
  });
  process.on("disconnect", stop);
  if (!isStateless(settings)) await takeRoot(settings.root);
  keeper = keeperOf(settings);
  // The supervisor starts another, which looks at everything anew.
  const giveUp = (error: unknown) => {
    if (isDiskFull(error)) keeper?.tellNoRoom();
    else logBug({ log: settings.log, worker: 0 }, error);
    process.exit(1);
  };
  process.on("uncaughtException", giveUp);
  process.on("unhandledRejection", giveUp);
  process.send?.("ready");
  keeper.start();
}

/**
 * Waits until no other keeper has the root: the one that was killed may take a moment to end, and two servers over one root
 * would each count revisions of their own. The lock goes with this process.
 */
async function takeRoot(root: string): Promise<void> {
  for (let tries = 1; ; tries++) {
    try {
      mkdirSync(`${root}/.reprise`, { mode: 0o700, recursive: true });
      return void openLocked(`${root}/.reprise/${LOCK_FILE}`, 0o600);
    } catch (error) {
      // What cannot be written is said when it is to be.
      if (!(error instanceof Held)) return;
      if (tries === LOCK_TRIES_UNSAID)
        say(
          "warn",
          `${quote(root)} is kept by ${error.holder}, another server over the same root; waiting for its end`,
        );
      await sleep(LOCK_RETRY_MS);
    }
  }
}

/** Where the root cannot be written there is nothing to keep: whoever would join is told so. */
function keeperOf(settings: KeeperSettings): Pick<Keeper, "start" | "drain" | "close" | "onMessage" | "tellNoRoom"> {
  try {
    return new Keeper(settings, send);
  } catch (error) {
    // That may pass: the next keeper sees.
    if (isDiskFull(error)) process.exit(1);
    const why = (error as NodeJS.ErrnoException).code ?? String(error);
    const text = `refused: the root of the server that is joined cannot be written (${why})`;
    say("error", `${quote(settings.root)} cannot be written (${why}): no server can join this one`);
    const onMessage = (message: ForKeeper) => {
      if ("ended" in message) return;
      const { worker, message: said } = message;
      if (said.kind === "linked") send({ worker, message: { kind: "unlink", id: said.id, code: "refused", text } });
      else if (said.kind === "announce") send({ worker, message: { kind: "announced", id: said.id } });
    };
    return { start() {}, drain() {}, close() {}, onMessage, tellNoRoom() {} };
  }
}

/** Of SQLite, whose file is as it was before. */
function isDiskFull(error: unknown): boolean {
  return (error as { code?: unknown }).code === "SQLITE_FULL";
}

function send(message: FromKeeper): void {
  process.send?.(message);
}
