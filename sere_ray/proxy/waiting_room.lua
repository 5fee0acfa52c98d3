-- A request that finds no engine waits for one that restarts: `limits.queue_while_restarting_s`.
-- Engines are the servers of its application's backends: var(txn.sere_backends).
--
-- Ray tells HAProxy of a replica by a new configuration, for which a new HAProxy takes over. So a
-- request that waits in the old one asks again there: var(txn.sere_again) is set. In vain was the
-- wait of one that has var(txn.sere_nobody). sere_ray/proxy/haproxy.py fills in the numbers.

-- How many wait, by the second in which their wait ends. HAProxy may end the action of a client that
-- hangs up without a word to it: its place is free again when that second has passed.
local waiting = {}

local function has_place(now)
    local count = 0
    for second, number in pairs(waiting) do
        if second < now then
            waiting[second] = nil
        else
            count = count + number
        end
    end
    return count < ${PLACES}
end

local function is_any_up(backends)
    for backend in backends:gmatch("[^,]+") do
        for _, server in pairs(core.backends[backend].servers) do
            if server:get_stats().status:find("^UP") then
                return true
            end
        end
    end
    return false
end

core.register_action("sere_wait", { "http-req" }, function(txn)
    local backends = txn:get_var("txn.sere_backends")
    if is_any_up(backends) then
        return
    end
    if has_place(core.now().sec) then
        local deadline = core.now().sec + ${SECONDS}
        waiting[deadline] = (waiting[deadline] or 0) + 1
        while core.now().sec < deadline and not is_any_up(backends) do
            if tonumber(core.get_info().Stopping) == 1 then
                txn:set_var("txn.sere_again", 1)
                break
            end
            core.msleep(100)
        end
        if waiting[deadline] then
            waiting[deadline] = waiting[deadline] - 1
        end
    end
    if not is_any_up(backends) then
        txn:set_var("txn.sere_nobody", 1)
    end
end)
