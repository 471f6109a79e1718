/**
 * The client, answered by the very server that it names: equals of one ledger would send it to whichever comes next, and
 * then nobody could tell through which of them a change was made. Otherwise as client.ts.
 */
import { main } from "../../client.ts";
import { runScript } from "../../command.ts";
import { Peer } from "../../peer.ts";

const { open } = Peer;
Peer.open = (options) => open({ ...options, direct: true });

await runScript(main);
